"""Reading and writing of videos, and plots."""
