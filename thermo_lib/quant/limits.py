"""What the parameters of codes may be: they are stored as float16."""

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST = 65504.0  # the largest float16
LARGEST_ZERO_POINT = 1024.0  # up to here float16 resolves a zero point to half a code or better
