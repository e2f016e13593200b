"""Values for synthetic pages. What one split draws, no other split ever draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from typing import Literal

import xxhash

from engine.documents.drawing import Style
from engine.documents.values import alphanumeric

try:
    from faker import Faker
except ImportError as error:
    raise ImportError(
        f"{error}: synthetic pages need the extra `documents` (pip install 'headrace[documents]')"
    ) from error

Split = Literal["train", "dev", "test"]

_PARTS: dict[Split, range] = {"train": range(7), "dev": range(7, 8), "test": range(8, 10)}
_DATES = ("%d/%m/%Y", "%d-%m-%Y", "%d.%m.%Y", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%Y-%m-%d", "%d/%m/%y")
_CURRENCIES = (
    "",
    "",
    "$",
    "RM",
    "£",
    "EUR ",
    "USD ",
)  # no euro sign: pdfminer has no width for it in the standard fonts


class Values:
    """Invented values of one page: a function of the split and `seed`. Names, addresses, numbers, dates and main amounts are
    drawn until a hash of the value falls into the split's part, so that splits share none. Dates and amounts are written
    the template's way."""

    def __init__(self, split: Split, seed: str, style: Style) -> None:
        self._part = _PARTS[split]
        self.random = random.Random(f"{split}/{seed}")
        self._faker = _faker(style.pick("locale", ("en_US", "en_GB", "en_US", "en_CA")))
        self._faker.seed_instance(self.random.getrandbits(62))
        self._date_format = style.pick("date format", _DATES)
        self._currency = style.pick("currency", _CURRENCIES)
        self._decimals = style.pick("decimals", ("{:,.2f}", "{:.2f}", "{:,.2f}"))

    def _mine(self, make: Callable[[], str], key: Callable[[str], str] = alphanumeric) -> str:
        while True:
            value = make()
            if xxhash.xxh3_64_intdigest(key(value).encode()) % 10 in self._part:
                return value

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def company(self) -> str:
        return self._mine(lambda: str(self._faker.company()))

    def person(self) -> str:
        return self._mine(lambda: f"{self._faker.first_name()} {self._faker.last_name()}")

    def address(self) -> list[str]:
        """Two or three lines."""
        street = self._mine(lambda: str(self._faker.street_address()).replace("\n", ", "))
        city, code = str(self._faker.city()), str(self._faker.postcode())
        return [f"{street},", city, code] if self.maybe(0.3) else [f"{street},", f"{city} {code}"]

    def number(self) -> str:
        """An invoice's, an account's: letters and digits without spaces."""
        prefix = self.random.choice(("", "", "INV-", "A", "No", "2018/", "C-"))
        return self._mine(lambda: f"{prefix}{self.random.randrange(10**4, 10**8)}")

    def phone(self) -> str:
        return self._mine(lambda: f"+{self.random.randrange(1, 99)} {self.random.randrange(10**7, 10**10)}")

    def email(self) -> str:
        return self._mine(lambda: f"{self._faker.user_name()}@example.{self.random.choice(('com', 'org', 'net'))}")

    def occupation(self) -> str:
        return str(self._faker.job())

    def item(self) -> str:
        return " ".join(str(self._faker.catch_phrase()).split()[: self.random.randrange(1, 4)])

    def sentence(self) -> str:
        return str(self._faker.sentence(nb_words=self.random.randrange(6, 14)))

    def day(self) -> date:
        return self._day(lambda: date(2005, 1, 1) + timedelta(self.random.randrange(7000)))

    def later(self, day: date) -> date:
        return self._day(lambda: day + timedelta(self.random.randrange(7, 120)))

    def _day(self, make: Callable[[], date]) -> date:
        return date.fromisoformat(self._mine(lambda: make().isoformat()))

    def written(self, day: date) -> str:
        return day.strftime(self._date_format)

    def cents(self, low: int = 100, high: int = 500_000) -> int:
        """An amount in hundredths, drawn over orders of magnitude."""
        ratio = high / low
        return int(self._mine(lambda: str(int(low * ratio ** self.random.random())), str))

    def mine(self, cents: int) -> bool:
        """Whether an amount that follows from others may be a value of this split."""
        return xxhash.xxh3_64_intdigest(str(cents).encode()) % 10 in self._part

    def amount(self, cents: int) -> str:
        sign = "-" if cents < 0 else ""
        return sign + self._currency + self._decimals.format(abs(cents) / 100)


@cache
def _faker(locale: str) -> Faker:
    """Building one takes 20 ms; each page seeds it anew."""
    return Faker(locale)
