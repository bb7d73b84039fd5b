"""How uncertain a mean of few samples is."""

import functools
import math

import numpy as np

_CONFIDENCE = 0.95


@functools.cache
def student_quantile(dof: int) -> float:
    """How many standard errors the 95% interval of a mean reaches to either side (Student 1908).

    Args:
        dof: degrees of freedom, one less than there are samples.
    """
    # With t = √dof · tan(angle), the density is proportional to cos(angle)^(dof - 1).
    angles = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (dof - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(float(np.interp(_CONFIDENCE * mass[-1], mass, angles)))
