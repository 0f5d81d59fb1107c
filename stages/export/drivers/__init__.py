"""Scripts that run under other programs' own Python, which has no Ingot in it.

Each reads a job, a JSON file, and writes an answer, another: `python DRIVER JOB ANSWER`. What they
ask of a program is what its users ask; where a program does more than that, as to read back what
its loader made of a file, the script says so. `stages/export/programs.py` runs them.
"""
