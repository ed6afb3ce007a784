"""Writes the high-precision truth beside this file: `python tests/vectors/make_vectors.py` (needs mpmath).

Loss values are the defining formulas in 60 digits, gradients their central differences with step 1e-20:
nothing is shared with the package. Logits are multiples of 1/8, exact in fp32. What a divergence treats as
constant (the weights of adaptive_kl, a detached mixture) is frozen where the difference is taken.
"""

import json
from pathlib import Path

import mpmath as mp

mp.mp.dps = 60
STEP = mp.mpf(10) ** -20
INFINITY = float("inf")

SETTINGS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.125}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_forward_kl", {"alpha": 0.75}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1, "detach_mixture": True}),
    ("alpha_beta", {"ab_alpha": 0.2, "ab_beta": 0.7}),
    ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": 0.0}),
    ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 0.5}),
    ("alpha_beta", {"ab_alpha": 0.25, "ab_beta": 1e-6}),
    ("adaptive_kl", {}),
    ("tvd", {}),
    ("mse", {}),
]
WILD_SETTINGS = [
    ("alpha_beta", {"ab_alpha": 0.5, "ab_beta": -0.5}),
    ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 0.0}),
    ("alpha_beta", {"ab_alpha": -0.25, "ab_beta": -0.5}),
    ("alpha_beta", {"ab_alpha": 1.5, "ab_beta": -0.5}),
]
# name, temperature, student logits, teacher logits
LOGITS = [
    ("near", 2.0, [0.5, -1.25, 2.0, 0.125], [0.625, -1.0, 1.75, 0.0]),
    ("plain", 3.0, [1.0, -0.5, 0.25, 2.5, -3.0], [-1.5, 0.75, 3.0, 1.0, 0.5]),
    ("far", 0.5, [31.5, -44.25, 12.0, 60.125, -7.5, 3.0], [-28.0, 50.5, 17.25, -61.0, 49.125, 2.0]),
    ("one_hot_teacher", 2.0, [0.5, 1.5, -0.25, 0.0], [0.0, 1000.0, 0.0, 0.0]),
    ("one_hot_both_elsewhere", 1.0, [300.0, 0.0, 0.0], [0.0, 300.0, 0.0]),
    ("both_underflow", 1.0, [0.5, -500.0, 1.0], [1.25, -600.0, -0.5]),
    ("equal", 2.0, [0.5, -1.25, 2.0], [0.5, -1.25, 2.0]),
    ("masked_in_both", 2.0, [0.5, -INFINITY, 2.0, -1.0], [1.5, -INFINITY, -0.5, 0.25]),
    ("masked_in_teacher", 2.0, [0.5, 1.0, 2.0, -1.0], [1.5, -INFINITY, -0.5, 0.25]),
    ("masked_in_student", 2.0, [0.5, -INFINITY, 2.0, -1.0], [1.5, 1.0, -0.5, 0.25]),
]


def softmax(logits, temperature):
    powers = [mp.mpf(0) if x == -INFINITY else mp.exp(mp.mpf(x) / temperature) for x in logits]
    return [power / mp.fsum(powers) for power in powers]


def kl(a, b):
    return mp.fsum(x * mp.log(x / y) if y else mp.inf for x, y in zip(a, b, strict=True) if x)


def mixture(a, b, weight):
    weight = mp.mpf(weight)
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def power(x, exponent):
    return x**exponent if x or exponent > 0 else mp.inf


def power_log_ratio(x, y, exponent):
    """x^e log(x^e / y^e), 0 at x = 0."""
    if not x:
        return mp.mpf(0)
    return x**exponent * exponent * mp.log(x / y) if y else mp.inf


def alpha_beta(p, q, a, b):
    """Cichocki et al. 2011, with the limits; classes without mass on either side are left out."""
    a, b, total = mp.mpf(a), mp.mpf(b), mp.mpf(0)
    for x, y in zip(p, q, strict=True):
        if not x and not y:
            continue
        if a == 0 and b == 0:
            total += mp.log(x / y) ** 2 / 2
        elif a == 0:
            total += (power_log_ratio(y, x, b) - power(y, b) + power(x, b)) / b**2
        elif b == 0:
            total += (power_log_ratio(x, y, a) - power(x, a) + power(y, a)) / a**2
        elif a + b == 0:
            total += (mp.log(y**a / x**a) + (x / y) ** a - 1) / a**2
        else:
            s = a + b
            total -= (power(x, a) * power(y, b) - a / s * power(x, s) - b / s * power(y, s)) / (a * b)
    return total


def adaptive_weights(p, q):
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    head, mass = set(), mp.mpf(0)
    for i in order:
        if mass > 0.5:
            break
        head.add(i)
        mass += p[i]
    distance = [abs(x - y) for x, y in zip(p, q, strict=True)]
    g_head = mp.fsum(distance[i] for i in head)
    return g_head, mp.fsum(distance) - g_head


def loss(student, teacher, frozen_student, temperature, divergence, options):
    """tau^2 D of one row; what is treated as constant is taken at `frozen_student`."""
    if divergence == "mse":
        pairs = [(s, t) for s, t in zip(student, teacher, strict=True) if -INFINITY not in (s, t)]
        return mp.fsum((mp.mpf(s) - mp.mpf(t)) ** 2 for s, t in pairs) / len(pairs)
    p, q, q_frozen = (softmax(x, temperature) for x in (teacher, student, frozen_student))
    if divergence == "forward_kl":
        value = kl(p, q)
    elif divergence == "reverse_kl":
        value = kl(q, p)
    elif divergence == "jsd":
        beta = mp.mpf(options["beta"])
        if beta == 0:
            value = kl(p, q)
        elif beta == 1:
            value = kl(q, p)
        else:
            m = mixture(p, q, beta)
            value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    elif divergence == "skew_forward_kl":
        value = kl(p, mixture(p, q, options["alpha"]))
    elif divergence == "skew_reverse_kl":
        inner = q_frozen if options.get("detach_mixture") else q
        value = kl(q, mixture(inner, p, options["alpha"]))
    elif divergence == "alpha_beta":
        value = alpha_beta(p, q, options["ab_alpha"], options["ab_beta"])
    elif divergence == "adaptive_kl":
        head, tail = adaptive_weights(p, q_frozen)
        whole = head + tail
        value = mp.mpf(0)
        if head:
            value += head / whole * kl(p, q)
        if tail:
            value += tail / whole * kl(q, p)
    else:
        value = mp.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    return temperature**2 * value


def gradient(student, teacher, temperature, divergence, options):
    """Central differences; 0 for a masked class. Where p = q every divergence has its minimum: 0."""
    if student == teacher:
        return [0.0] * len(student)
    differences = []
    for i, x in enumerate(student):
        if x == -INFINITY:
            differences.append(0.0)
            continue
        up, down = list(student), list(student)
        up[i], down[i] = mp.mpf(x) + STEP, mp.mpf(x) - STEP
        above, below = (loss(s, teacher, student, temperature, divergence, options) for s in (up, down))
        differences.append(float((above - below) / (2 * STEP)))
    return differences


def main():
    cases = []
    for settings, logits in (
        (SETTINGS, LOGITS),
        (WILD_SETTINGS, [x for x in LOGITS if x[0] in ("near", "plain", "masked_in_both")]),
    ):
        for divergence, options in settings:
            for name, temperature, student, teacher in logits:
                value = loss(student, teacher, student, mp.mpf(temperature), divergence, options)
                if value == mp.inf:
                    continue
                case = {
                    "logits": name,
                    "divergence": divergence,
                    "options": options,
                    "temperature": temperature,
                    "student": [str(x) for x in student],
                    "teacher": [str(x) for x in teacher],
                    "loss": float(value),
                    "gradient": gradient(student, teacher, mp.mpf(temperature), divergence, options),
                }
                cases.append(case)
    lines = ",\n".join(json.dumps(case) for case in cases)
    Path(__file__).with_name("divergences.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
