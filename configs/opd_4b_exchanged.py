# opd_4b_exchanged.py - opd_4b whose Base student begins with the rows of its stop id and the
# teacher's exchanged, so that it ends as the teacher does from the first step on: docs/stops.md.
# The template writes the teacher's id into prompts, so the LM head becomes a matrix of its own:
# 2.5 GB more with its gradient and Adam's moments.
from configs.opd_4b import *

exchange_stops = True
stop = "student"                    # the same ids then as with "union"
out_dir = "out/opd_4b_exchanged"
