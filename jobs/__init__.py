"""The outside: job specs and the command line."""
