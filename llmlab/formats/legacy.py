"""The first block formats: 32 weights, a half-precision scale, sometimes a minimum.

Block bytes are what the parts add up to: scale (2), minimum (2), high bits (4), codes.
"""

from .registry import register

Q4_0 = register("Q4_0", 2, 32, 2 + 16, "legacy")
Q4_1 = register("Q4_1", 3, 32, 2 + 2 + 16, "legacy")
Q5_0 = register("Q5_0", 6, 32, 2 + 4 + 16, "legacy")
Q5_1 = register("Q5_1", 7, 32, 2 + 2 + 4 + 16, "legacy")
Q8_0 = register("Q8_0", 8, 32, 2 + 32, "legacy")
Q8_1 = register("Q8_1", 9, 32, 2 + 2 + 32, "legacy")
Q1_0 = register("Q1_0", 41, 128, 2 + 16, "legacy")
Q2_0 = register("Q2_0", 42, 64, 2 + 16, "legacy")
