"""Questions for a real language model: word problems with a computed answer, and open ones that want an
argument.

Every word problem is a template with names, things and numbers drawn at random, in the manner of grade-school
problems; the numbers are drawn such that the answer is a whole number. They are written for this project, so
that what a model says about them may be kept and shared. ``split`` decides by template: what is reported is
asked in words that nothing was chosen on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Amara",
    "Bruno",
    "Chen",
    "Dalia",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Imani",
    "Jonas",
    "Keiko",
    "Luca",
    "Mira",
    "Noor",
    "Oskar",
    "Priya",
    "Rosa",
    "Samir",
    "Tilda",
    "Yusuf",
)
THINGS = (
    "apples",
    "pencils",
    "marbles",
    "stickers",
    "postcards",
    "shells",
    "buttons",
    "walnuts",
    "stamps",
    "candles",
    "tickets",
    "bricks",
)
PLACES = ("a bakery", "a library", "a school", "a farm", "a garage", "a museum", "a theatre", "a harbour")


@dataclass(frozen=True)
class Question:
    """A question as a user would ask it; ``answer`` is the number it has, None for an open one; ``template``
    tells its wording.
    """

    text: str
    answer: int | None
    template: int


Draw = tuple[str, int]  # text, answer


def _shares(r: random.Random) -> Draw:
    children, each, left, name = r.randint(3, 9), r.randint(3, 14), r.randint(1, 8), r.choice(NAMES)
    left = min(left, children - 1)
    return (
        (
            f"{name} has {children * each + left} {r.choice(THINGS)} and gives the same number to each of"
            f" {children} children, as many as possible. How many are left over?"
        ),
        left,
    )


def _shop(r: random.Random) -> Draw:
    name, thing, n, price, paid = (
        r.choice(NAMES),
        r.choice(THINGS),
        r.randint(3, 9),
        r.randint(2, 11),
        r.choice((100, 120, 150)),
    )
    return (
        (
            f"{name} buys {n} boxes of {thing} at ${price} each and pays with ${paid}. How much change does"
            f" {name} get?"
        ),
        paid - n * price,
    )


def _two_days(r: random.Random) -> Draw:
    name, first, factor, less = r.choice(NAMES), r.randint(8, 40), r.randint(2, 4), r.randint(2, 7)
    return (
        (
            f"On Monday {name} reads {first} pages. On Tuesday {name} reads {factor} times as many, and on"
            f" Wednesday {less} pages fewer than on Tuesday. How many pages does {name} read in the three"
            " days?"
        ),
        first + factor * first + factor * first - less,
    )


def _speed(r: random.Random) -> Draw:
    speed, hours, rest, more = r.randint(4, 18) * 5, r.randint(2, 5), r.randint(2, 4), r.randint(3, 16) * 5
    return (
        (
            f"A bus drives for {hours} hours at {speed} km per hour, stops, and then drives for {rest} more"
            f" hours at {more} km per hour. How many kilometres does it drive in all?"
        ),
        speed * hours + more * rest,
    )


def _age(r: random.Random) -> Draw:
    a, b = r.sample(NAMES, 2)
    young, factor, years = r.randint(4, 12), r.randint(2, 4), r.randint(3, 9)
    return (
        f"{a} is {young} years old, and {b} is {factor} times as old. How old will {b} be in {years} years?",
        young * factor + years,
    )


def _fence(r: random.Random) -> Draw:
    length, width, price = r.randint(6, 25), r.randint(4, 15), r.randint(3, 9)
    return (
        (
            f"A rectangular garden is {length} metres long and {width} metres wide. A fence around it costs"
            f" ${price} per metre. What does the fence cost?"
        ),
        2 * (length + width) * price,
    )


def _percent(r: random.Random) -> Draw:
    price, percent = r.randint(2, 20) * 20, r.choice((5, 10, 15, 20, 25, 30, 40))
    return (
        f"A coat costs ${price}. In the sale it is {percent}% cheaper. What does it cost in the sale?",
        price - price * percent // 100,
    )


def _work(r: random.Random) -> Draw:
    place, people, each, days = r.choice(PLACES), r.randint(3, 9), r.randint(4, 12), r.randint(2, 6)
    done = r.randint(1, people * each * days // 2)
    return (
        (
            f"At {place}, {people} people can each pack {each} parcels a day. There were orders for"
            f" {people * each * days + done} parcels. After {days} days, how many parcels are still to be"
            " packed?"
        ),
        done,
    )


def _eggs(r: random.Random) -> Draw:
    hens, each, sold, price = r.randint(6, 20), r.randint(2, 6), r.randint(2, 5), r.randint(2, 6)
    eaten = hens * each % sold if hens * each % sold else sold
    return (
        (
            f"{hens} hens lay {each} eggs each. The farmer eats {eaten} eggs and sells the rest in packs of"
            f" {sold}, at ${price} a pack. How much does the farmer earn?"
        ),
        (hens * each - eaten) // sold * price,
    )


def _difference(r: random.Random) -> Draw:
    a, b = r.sample(NAMES, 2)
    thing, small, more = r.choice(THINGS), r.randint(6, 45), r.randint(4, 30)
    return (
        (
            f"{a} and {b} have {2 * small + more} {thing} together. {a} has {more} more than {b}. How many"
            f" does {b} have?"
        ),
        small,
    )


def _rows(r: random.Random) -> Draw:
    rows, seats, empty, price = r.randint(6, 20), r.randint(8, 24), r.randint(3, 30), r.randint(4, 12)
    return (
        (
            f"A theatre has {rows} rows of {seats} seats. On Friday {empty} seats stay empty. A ticket costs"
            f" ${price}. How much money is taken on Friday?"
        ),
        (rows * seats - empty) * price,
    )


def _savings(r: random.Random) -> Draw:
    name, week, weeks, spent = r.choice(NAMES), r.randint(5, 25), r.randint(4, 12), r.randint(5, 19)
    return (
        (
            f"{name} saves ${week} every week. After {weeks} weeks {name} spends ${spent} on a gift, and then"
            " half of what is left on a"
            f" book{'' if (week * weeks - spent) % 2 == 0 else ' that costs a further $1'}. How much is left?"
        ),
        ((week * weeks - spent) // 2 if (week * weeks - spent) % 2 == 0 else (week * weeks - spent - 1) // 2),
    )


def _tank(r: random.Random) -> Draw:
    into, out, minutes, start = r.randint(8, 20), r.randint(2, 7), r.randint(5, 20), r.randint(10, 90)
    return (
        (
            f"A tank holds {start} litres. A tap lets in {into} litres per minute while {out} litres per"
            f" minute leak out. How many litres are in the tank after {minutes} minutes?"
        ),
        start + (into - out) * minutes,
    )


def _average(r: random.Random) -> Draw:
    name, mean, given = r.choice(NAMES), r.randint(50, 90), None
    given = [mean + d for d in (r.randint(-15, 15), r.randint(-15, 15))]
    last = 3 * mean - sum(given)
    return (
        (
            f"{name} scores {given[0]} and {given[1]} points in two tests. What must the third score be for"
            f" an average of {mean}?"
        ),
        last,
    )


def _clock(r: random.Random) -> Draw:
    name, hour, minutes, trips = r.choice(NAMES), r.randint(6, 9), r.randint(11, 47), r.randint(2, 4)
    return (
        (
            f"A walk around the lake takes {minutes} minutes. {name} starts at {hour}:00 and walks around it"
            f" {trips} times without a break. How many minutes after {hour}:00 is {name} done?"
        ),
        minutes * trips,
    )


def _equation(r: random.Random) -> Draw:
    x, factor, plus = r.randint(3, 25), r.randint(2, 9), r.randint(2, 40)
    return (
        (
            f"I think of a number, multiply it by {factor} and add {plus}. The result is {factor * x + plus}."
            " What is my number?"
        ),
        x,
    )


def _order(r: random.Random) -> Draw:
    n, before = r.randint(12, 40), r.randint(3, 9)
    return (
        (
            f"{n} people stand in a queue. {before} of them are in front of {(name := r.choice(NAMES))}. How"
            f" many people are behind {name}?"
        ),
        n - before - 1,
    )


def _digits(r: random.Random) -> Draw:
    a, b = r.randint(12, 98), r.randint(12, 98)
    return f"What is {a} + {b} - {(c := r.randint(2, 8))} * {(d := r.randint(2, 3))}?", a + b - c * d


TEMPLATES: tuple[Callable[[random.Random], Draw], ...] = (
    _shares,
    _shop,
    _two_days,
    _speed,
    _age,
    _fence,
    _percent,
    _work,
    _eggs,
    _difference,
    _rows,
    _savings,
    _tank,
    _average,
    _clock,
    _equation,
    _order,
    _digits,
)
REPORTED = (1, 4, 9, 12, 15)  # templates asked in the report split only
CHOSEN = (3, 7, 10)  # in the choose split only

SUBJECTS = (
    "a ship made of steel",
    "a candle in a closed jar",
    "a stone on the moon",
    "a glass of salt water in the frost",
    "a thermometer in the sun",
    "a bicycle on ice",
    "a tree in winter",
    "an echo in a valley",
    "a kettle on a high mountain",
    "a shadow at noon",
    "a compass near a magnet",
    "a balloon in a cold room",
    "a wet towel in the wind",
    "a mirror in the dark",
)
CLAIMS = (
    "all {a} are {b}, and some {b} are {c}",
    "no {a} are {b}, and all {c} are {a}",
    "all {a} who are {b} are also {c}",
    "some {a} are {b}, and no {b} are {c}",
)
KINDS = (
    "poets",
    "swimmers",
    "engineers",
    "gardeners",
    "painters",
    "travellers",
    "dancers",
    "bakers",
    "readers",
    "sailors",
    "teachers",
    "runners",
)
PLANS = (
    "move a heavy cupboard up a narrow staircase",
    "share a cake fairly among three people with one cut each",
    "find a broken lamp among twelve in a row",
    "cross a river with a boat for two",
    "measure four litres with a jug of three and a jug of five",
    "keep ice cream cold without a freezer",
    "plan a week of meals on a small budget",
    "learn twenty words of a new language in a day",
    "find out which of two coins is heavier",
    "seat eight guests of whom two do not speak to each other",
)


def _open(r: random.Random) -> str:
    kind = r.randrange(4)
    if kind == 0:
        return (
            f"What happens to {r.choice(SUBJECTS)}, and why? Consider {r.choice(('two', 'three'))} possible"
            " explanations before you decide."
        )
    if kind == 1:
        a, b, c = r.sample(KINDS, 3)
        return (
            f"Suppose that {r.choice(CLAIMS).format(a=a, b=b, c=c)}. Does it follow that some {a} are {c}?"
            " Explain your reasoning."
        )
    if kind == 2:
        return (
            f"How would you {r.choice(PLANS)}? Is there {r.choice(('another', 'a better', 'a simpler'))} way?"
        )
    a, b = r.sample(SUBJECTS, 2)
    return f"What do {a} and {b} have in common, and how do they differ?"


def ask(split: str, n: int, open_share: float = 0.25, seed: int = 0) -> list[Question]:
    """``n`` distinct questions of a split, the same for the same seed: open ones in the given share, word
    problems otherwise.
    """
    rng, found = random.Random(f"{seed}/questions/{split}"), {}
    own = {"report": REPORTED, "choose": CHOSEN}.get(split) or [
        i for i in range(len(TEMPLATES)) if i not in REPORTED + CHOSEN
    ]
    while len(found) < n:
        if rng.random() < open_share:
            question = Question(_open(rng), None, -1)
        else:
            template = rng.choice(own)
            question = Question(*TEMPLATES[template](rng), template)
        found.setdefault(question.text, question)
    return list(found.values())


def final_number(text: str) -> float | None:
    """The number an answer ends with: the last \\boxed{...} if there is one, else the last number in the
    text.
    """
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d+(?:\.\d+)?", (boxed[-1] if boxed else text).replace(",", ""))
    return float(numbers[-1]) if numbers else None
