"""The doctor's look at an intended run, before it starts: one module for each thing that can stop or slow it."""
