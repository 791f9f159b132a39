"""What the other commands in `tools/` are made of: command lines, the doctor's checks, packing and sample data."""
