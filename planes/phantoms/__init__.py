"""Procedural ultrasound: five planes, sites with a domain shift, in the two datasets' own layouts.

    python -m planes.phantoms --out runs/phantoms                # site A as spanish/, B as african/
    python -m planes.phantoms --out runs/third --african-site C  # site C in the place of B

| concept | where |
|---|---|
| the anatomy of a plane; folders in the datasets' layouts | `phantom.py` |
| the scanner: tissue, probe, speckle, shadows, scan conversion | `scanner.py` |
| the probes of four sites | `sites.py` |
"""
