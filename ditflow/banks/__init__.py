"""Motion banks: learned position offsets, their compression, and resizing to other token grids."""
