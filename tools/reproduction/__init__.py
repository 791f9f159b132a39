"""Tables and figures of the three papers as commands: which rows each has, how a row is made, and what came out."""
