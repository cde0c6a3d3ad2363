"""What every script is wrapped in: files, flags, records of runs, resuming, several processes.
Nothing of diffusion.

| concept | where |
|---|---|
| files written whole or not at all, hashed, found in folders | `files.py` |
| alone in --out, a mistake in one line, progress that a log can hold | `script.py` |
| types of flags that every script has | `flags.py` |
| arguments, versions, machine and input hashes beside a run's outputs | `record.py` |
| when a run saves, how, and what may go on from it; learning-rate schedules | `resume.py` |
| torchrun: rank, size, share, all_reduce | `processes.py` |
"""
