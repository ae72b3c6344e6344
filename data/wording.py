"""The sentences of the story tasks: how a prompt may be put, and how a step of its answer may be said.

Answers are drawn by weight from :data:`STEPS`, so the same answer has many wordings of different lengths and orders: a guess
may be right although it is doubtful. Prompts have two sets of wordings that share no sentence: ``train``, and ``held_out``,
which only evaluation uses.

Slots: ``{p}`` and ``{q}`` people, ``{t}`` what is counted, ``{box}`` a container, ``{a}``, ``{b}``, ``{c}`` numbers: the
operands of a step and its result.
"""

NAMES = ("Mia", "Tom", "Ben", "Ann", "Leo", "Eva", "Sam", "Zoe", "Max", "Ida", "Jon", "Kim")
THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "shells", "stamps", "cups", "toys", "nuts", "stones")
BOXES = ("boxes", "bags", "crates", "jars")
ITEMS = ("lamp", "cup", "bag", "book", "clock", "chair", "drum", "box", "kite", "bell", "sword", "vase")

WEIGHTS = (0.4, 0.22, 0.15, 0.1, 0.08, 0.05)
"""Weight of the first, second, ... form of a sentence; the most frequent one is far from certain."""

# What a prompt tells, by event. The first list is for training, the second is held out.
PROMPT: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "start": (
            "{p} has {c} {t}.",
            "{p} owns {c} {t}.",
            "There are {c} {t} on the table of {p}.",
            "{p} starts with {c} {t}.",
        ),
        "gain": (
            "{p} buys {b} {t}.",
            "{p} finds {b} more {t}.",
            "A friend gives {p} {b} {t}.",
            "{p} gets {b} {t} as a gift.",
        ),
        "lose": ("{p} loses {b} {t}.", "{p} sells {b} of the {t}.", "{p} gives away {b} {t}.", "{b} {t} of {p} break."),
        "double": (
            "Then {p} doubles the number of {t}.",
            "{p} gets as many {t} again.",
            "The number of {t} of {p} doubles.",
        ),
        "share": (
            "{p} shares the {t} equally among {b} people and keeps one part.",
            "{p} splits the {t} into {b} equal parts and keeps one of them.",
            "{p} keeps only one of {b} equal parts of the {t}.",
        ),
        "pack": (
            "{p} buys {a} {box} with {b} {t} each.",
            "{p} gets {a} {box} of {b} {t}.",
            "{a} {box} of {b} {t} each are brought to {p}.",
        ),
        "move": ("{p} gives {b} {t} to {q}.", "{q} gets {b} {t} from {p}.", "{p} hands {b} of the {t} to {q}."),
        "distract": (
            "It rains for {b} hours.",
            "The brother of {p} is {b} years old.",
            "{p} walks {b} miles.",
            "The house has {b} windows.",
            "{p} sees {b} birds.",
        ),
        "price": ("Each of the {t} costs {b} dollars.", "One of the {t} is worth {b} dollars."),
        "ask_end": (
            "How many {t} does {p} have now?",
            "How many {t} does {p} have in the end?",
            "Find the number of {t} of {p}.",
        ),
        "ask_total": ("How many {t} do {p} and {q} have together?", "How many {t} do they have in all?"),
        "ask_difference": ("How many more {t} does {p} have than {q}?", "By how many {t} is {p} ahead of {q}?"),
        "ask_more": ("Who has more {t}?", "Who has more {t}, {p} or {q}?"),
        "ask_price": ("How many dollars are the {t} of {p} worth now?", "What do all {t} of {p} cost?"),
        "up": (
            "Put these in order, smallest number first: {t}.",
            "Sort from small to large: {t}.",
            "Which order goes from small to large? {t}.",
        ),
        "down": (
            "Put these in order, largest number first: {t}.",
            "Sort from large to small: {t}.",
            "Which order goes from large to small? {t}.",
        ),
        "add": ("What is {a} + {b}?", "Add {b} to {a}.", "{a} and {b} more: how many?", "What do {a} and {b} make?"),
        "subtract": (
            "What is {a} - {b}?",
            "Take {b} from {a}.",
            "{a} without {b}: how many?",
            "What is left of {a} after {b} are gone?",
        ),
        "multiply": (
            "What is {a} * {b}?",
            "How many are {a} times {b}?",
            "{a} bags of {b}: how many?",
            "What do {a} times {b} make?",
        ),
        "divide": (
            "What is {a} / {b}?",
            "Split {a} into {b} equal parts.",
            "{a} shared among {b}: how many?",
            "What is one part of {b} from {a}?",
        ),
        "compare": (
            "Which is more, {a} or {b}?",
            "What is the larger number, {a} or {b}?",
            "{a} and {b}: which is larger?",
        ),
    },
    "held_out": {
        "start": ("At first {p} has {c} {t}.", "{c} {t} are on the table of {p}."),
        "gain": ("Then {p} finds {b} {t}.", "{b} more {t} are a gift to {p}.", "{p} buys {b} more of the {t}."),
        "lose": ("Then {p} sells {b} {t}.", "{p} gives {b} {t} away.", "{p} loses {b} of the {t}."),
        "double": ("Now the number of {t} doubles.", "Then {p} gets as many {t} again as a gift."),
        "share": (
            "Then {p} splits the {t} equally among {b} people and keeps one part.",
            "Of {b} equal parts of the {t} {p} keeps one.",
        ),
        "pack": ("Then {p} finds {a} {box} with {b} {t} each.", "A friend gives {p} {a} {box} of {b} {t} each."),
        "move": ("Then {p} gives {q} {b} {t}.", "{b} of the {t} of {p} are handed to {q}."),
        "distract": ("Then it rains for {b} hours.", "{b} birds are on the house.", "{p} has a brother of {b} years."),
        "price": ("The {t} cost {b} dollars each.",),
        "ask_end": ("What number of {t} does {p} have now?", "In the end, how many {t} does {p} have?"),
        "ask_total": ("Together, how many {t} do {p} and {q} have?",),
        "ask_difference": ("How many {t} more than {q} does {p} have?",),
        "ask_more": ("Of {p} and {q}, who has more {t}?",),
        "ask_price": ("Now how many dollars do the {t} of {p} cost in all?",),
        "up": ("Sort these, smallest first: {t}.", "From small to large, which order do these have? {t}."),
        "down": ("Sort these, largest first: {t}.", "From large to small, which order do these have? {t}."),
        "add": ("How many are {a} and {b}?", "{b} added to {a}: how many?"),
        "subtract": ("How many are left of {a} without {b}?", "{b} taken from {a}: how many?"),
        "multiply": ("{a} times {b}: how many?", "How many are in {a} bags of {b}?"),
        "divide": ("Share {a} among {b}: how many?", "{a} split into {b} parts: how many?"),
        "compare": ("Of {a} and {b}, which is more?", "Which number is larger, {a} or {b}?"),
    },
}

# How a step of an answer is said. Each form holds the step's operands and its result, in some order.
STEPS: dict[str, tuple[str, ...]] = {
    "start": (
        "{p} has {c} {t} at first.",
        "we start with {c} {t} for {p}.",
        "in the beginning there are {c} {t}, all of them in the hands of {p}.",
        "{c} {t} belong to {p}.",
        "{p} owns {c}.",
    ),
    "gain": (
        "{p} gets {b} more, so there are {a} + {b} = {c} {t}.",
        "adding {b} gives {a} + {b} = {c}.",
        "{p} has {c} {t}, because {a} + {b} = {c}.",
        "the {t} of {p} grow by {b} from {a} to {c}.",
        "that makes {c} {t}, which is {a} and {b} more.",
        "{a} plus {b} is {c}.",
    ),
    "lose": (
        "{b} of them are gone, so {a} - {b} = {c} {t} are left.",
        "taking {b} away leaves {a} - {b} = {c}.",
        "{p} keeps {c} {t}, because {a} - {b} = {c}.",
        "the {t} of {p} fall by {b} from {a} to {c}.",
        "only {c} {t} remain, which is {a} without {b}.",
        "{a} minus {b} is {c}.",
    ),
    "double": (
        "twice as many are 2 * {a} = {c} {t}.",
        "doubling gives {a} * 2 = {c}.",
        "{p} has {c} {t}, because {a} + {a} = {c}.",
        "the {t} of {p} double from {a} to {c}.",
        "that makes {c} {t}, two times {a}.",
        "twice {a} is {c}.",
    ),
    "share": (
        "one of {b} parts is {a} / {b} = {c} {t}.",
        "sharing gives {a} / {b} = {c}.",
        "{p} keeps {c} {t}, because {b} * {c} = {a}.",
        "each of the {b} parts of the {a} {t} has {c}.",
        "that leaves {c} {t}, one part of {b} from {a}.",
        "{a} divided by {b} is {c}.",
    ),
    "pack": (
        "the {box} hold {a} * {b} = {c} {t}.",
        "{a} {box} of {b} are {a} * {b} = {c}.",
        "there are {c} {t} in the {box}, because {a} * {b} = {c}.",
        "each of the {a} {box} has {b}, in all {c} {t}.",
        "{c} {t} are new, {a} times {b}.",
        "{a} times {b} is {c}.",
    ),
    "total": (
        "together they have {a} + {b} = {c} {t}.",
        "both numbers give {a} + {b} = {c}.",
        "there are {c} {t} in all, because {a} + {b} = {c}.",
        "{p} with {a} and {q} with {b} have {c} {t} together.",
        "{a} plus {b} is {c}.",
    ),
    "difference": (
        "the difference is {a} - {b} = {c} {t}.",
        "{p} has {a} - {b} = {c} more.",
        "{p} is ahead by {c} {t}, because {a} - {b} = {c}.",
        "{c} is what lies between {b} and {a}.",
        "{a} minus {b} is {c}.",
    ),
    "more": (
        "{p} has {a} and {q} has {b}, so {p} has more.",
        "{a} is more than {b}, so it is {p}.",
        "it is {p}, because {a} is above {b}.",
        "{q} has only {b} {t}, but {p} has {a}.",
        "{p} wins by {a} to {b}.",
    ),
    "price": (
        "all {t} are worth {a} * {b} = {c} dollars.",
        "the price is {a} * {b} = {c}.",
        "they cost {c} dollars, because {a} * {b} = {c}.",
        "for {b} dollars each the {a} {t} cost {c} dollars.",
        "{a} times {b} is {c}.",
    ),
    "first": (
        "the {t} with {c} comes first.",
        "first is the {t}, because it has {c}.",
        "{c} is the number to start with, and it is the {t}.",
        "we begin with the {t} of {c}.",
        "start with the {t}, number {c}.",
    ),
    "next": (
        "the {t} with {c} follows {a}.",
        "after {a} comes the {t}, because it has {c}.",
        "{c} is next in line after {a}, and it is the {t}.",
        "we take the {t} of {c} after that of {a}.",
        "{a} is followed by the {t}, number {c}.",
    ),
    "add": (
        "{a} + {b} = {c}.",
        "adding {b} to {a} gives {c}.",
        "it is {c}, because {a} + {b} = {c}.",
        "{a} and {b} more are {c}.",
        "{a} plus {b} is {c}.",
    ),
    "subtract": (
        "{a} - {b} = {c}.",
        "taking {b} from {a} leaves {c}.",
        "it is {c}, because {a} - {b} = {c}.",
        "{a} without {b} is {c}.",
        "{a} minus {b} is {c}.",
    ),
    "multiply": (
        "{a} * {b} = {c}.",
        "taking {b} not once but {a} times gives {c}.",
        "it is {c}, because {a} * {b} = {c}.",
        "{a} of {b} each are {c}.",
        "{a} times {b} is {c}.",
    ),
    "divide": (
        "{a} / {b} = {c}.",
        "one of {b} equal parts of {a} is {c}.",
        "it is {c}, because {b} * {c} = {a}.",
        "{a} in {b} parts gives {c}.",
        "{a} divided by {b} is {c}.",
    ),
    "compare": (
        "{a} is more than {b}.",
        "{b} is less than {a}, so it is {a}.",
        "it is {a}, because {a} is above {b}.",
        "of the two, {a} is larger.",
        "{b} is below {a}.",
    ),
}

# What may stand before a step, at the beginning, between steps and at the end, with its weight; "" is nothing.
LEADS = (("", 0.5), ("Then ", 0.2), ("Next, ", 0.12), ("After that, ", 0.1), ("So ", 0.08))
OPENINGS = (
    ("", 0.5),
    ("Let us go step by step.", 0.2),
    ("We look at each step in turn.", 0.15),
    ("Here is how.", 0.15),
)
ASIDES = (
    ("", 0.8),
    ("The rest does not matter.", 0.08),
    ("This is simple.", 0.07),
    ("We keep that in mind for the next step.", 0.05),
)
CLOSINGS = (
    ("", 0.4),
    ("The answer is {c}.", 0.25),
    ("So we say {c}.", 0.15),
    ("That is all, and {c} is the answer.", 0.12),
    ("It is {c}.", 0.08),
)
