"""Block-scaled E4M3: casts, the slow twin that defines the numbers, and the Linear seam."""
