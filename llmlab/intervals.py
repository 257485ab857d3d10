"""What a few dozen right and wrong answers can say: intervals of a share, and of the difference of two shares that were
measured on the same items.

Sources: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209, the score interval; Q. McNemar, Psychometrika 12 (1947) 153, in its
exact form; T. Tango, Statistics in Medicine 17 (1998) 891, the score interval of a paired difference.
"""

from math import comb, copysign, sqrt

Z = 1.959963984540054   # of 95 %, two-sided
LEVEL = 0.05


def wilson(right: int, count: int, z: float = Z) -> tuple[float, float]:
    """The 95 % interval of a share: it holds for few items, and for none or all of them right."""
    if not count:
        return 0.0, 1.0
    share, width = right / count, z * z / count
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * sqrt(share * (1 - share) / count + width / (4 * count))
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


def mcnemar(lost: int, gained: int) -> float:
    """The chance that items which changed fall so unevenly, or more so, if each were as likely lost as gained: the exact test
    of two paired shares, two-sided; 1 where none changed."""
    changed, few = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(comb(changed, k) for k in range(few + 1)) / 2**changed)


def tango(gained: int, lost: int, count: int, z: float = Z) -> tuple[float, float]:
    """The 95 % interval of (gained - lost) / count, the difference of two shares on the same items: Tango's score interval,
    which knows that the two are paired and does not close to a point where nothing changed."""
    if not count:
        return -1.0, 1.0
    found = (gained - lost) / count
    return (_edge(gained, lost, count, z, -1.0, found), _edge(gained, lost, count, z, 1.0, found))


def _edge(gained: int, lost: int, count: int, z: float, far: float, near: float) -> float:
    """Where the score is z, between the difference that was found and the furthest there is."""
    if far == near:
        return far
    for _ in range(100):
        middle = (far + near) / 2
        if abs(_score(gained, lost, count, middle)) < z:
            near = middle
        else:
            far = middle
    return (far + near) / 2


def _score(gained: int, lost: int, count: int, difference: float) -> float:
    """Tango's statistic: how far what was found lies from a difference, in standard errors under that difference, by the
    likeliest share of lost items it leaves."""
    b = -gained - lost + (2 * count - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    share = (sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
    variance = count * (2 * share + difference * (1 - difference))
    away = gained - lost - count * difference
    if variance <= 0:
        return copysign(float("inf"), away) if away else 0.0
    return away / sqrt(variance)


def least_shown(changed: int, level: float = LEVEL) -> int:
    """By how many items two paired results must differ for `mcnemar` to fall below `level`, where `changed` items changed: as
    few as all that changed one way can be (6 at 5 %), or what so many changes ask for."""
    while mcnemar(changed, 0) >= level:
        changed += 1
    few = max(few for few in range(changed // 2 + 1) if mcnemar(changed - few, few) < level)
    return changed - 2 * few
