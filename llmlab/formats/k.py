"""K formats: super-blocks of 256 weights whose block scales are themselves quantized.

Block bytes are what the parts add up to: codes, high bits, packed scales and minima, one or two
half-precision numbers that scale them (Q8_K holds float32 and sums; it never reaches a file).
"""

from .registry import register

Q2_K = register("Q2_K", 10, 256, 64 + 16 + 4, "k")
Q3_K = register("Q3_K", 11, 256, 64 + 32 + 12 + 2, "k")
Q4_K = register("Q4_K", 12, 256, 128 + 12 + 4, "k")
Q5_K = register("Q5_K", 13, 256, 128 + 32 + 12 + 4, "k")
Q6_K = register("Q6_K", 14, 256, 128 + 64 + 16 + 2, "k")
Q8_K = register("Q8_K", 15, 256, 4 + 256 + 32, "k")
