"""The training application."""

import os

# PyTorch's CPU threads wait for each other at the end of every operation. By default they spin, which takes a core away
# from the thread that they wait for as soon as anything else runs: beside other work on two cores, training a small
# network fell to a small part of its rate. OpenMP reads this once, when PyTorch is imported, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
