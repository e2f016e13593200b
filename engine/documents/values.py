"""When two texts of a field are the same value: normal forms of dates, amounts and names.

All rules are linear in the text: it may come from a model that is paid for finding slow ones.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import date
from decimal import Decimal
from typing import Literal

Kind = Literal["date", "amount", "text"]

AMOUNTS = frozenset({"total", "subtotal", "tax", "amount", "price", "balance", "opening_balance", "closing_balance"})
_LONGEST = 64
"""No date and no amount is longer; a longer text is compared as text."""


def kind_of(field: str) -> Kind:
    """How a field's values are compared: a name that ends in "date" as dates, the names in `AMOUNTS` as amounts, all
    others as text."""
    name = field.casefold()
    if name.endswith("date"):
        return "date"
    return "amount" if name in AMOUNTS else "text"


def normal(field: str, value: str) -> str:
    """The normal form of a field's value: two values are the same exactly when their normal forms are. A date as
    "2018-03-29" and an amount as "7.1"; what cannot be read as one, and all else, as `alphanumeric` text. Empty for a
    value without a letter or digit."""
    reading = _reading(field, value)
    return alphanumeric(value) if reading is None else reading


def reads_as(field: str, value: str) -> bool:
    """Whether a value is of its field's kind: a date, an amount, or any text."""
    return kind_of(field) == "text" or _reading(field, value) is not None


def _reading(field: str, value: str) -> str | None:
    """The date or the amount in its normal form; None for text, and where a value is not of its field's kind."""
    match kind_of(field):
        case "date":
            return read_date(value)
        case "amount":
            return read_amount(value)
    return None


def alphanumeric(text: str) -> str:
    """Letters and digits alone, case folded: neither case nor punctuation nor spacing counts."""
    return "".join(char for char in unicodedata.normalize("NFKC", text).casefold() if char.isalnum())


# --- dates ---------------------------------------------------------------------------------------------------------

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAME = (
    r"(?P<name>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)"
)
_GAP = r"[\s./,'-]{0,3}"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4}|\d{2})"
_FORMS = (
    r"(?P<year>\d{4})\s?(?P<sep>[-/.])\s?(?P<month>\d{1,2})\s?(?P=sep)\s?(?P<day>\d{1,2})",
    r"(?P<first>\d{1,2})\s?(?P<sep>[-/. ])\s?(?P<second>\d{1,2})\s?(?P=sep)\s?" + _YEAR,
    _DAY + _GAP + r"(?:of\s)?" + _NAME + _GAP + _YEAR,
    _NAME + _GAP + _DAY + r"[\s,./'-]{1,3}" + _YEAR,
    r"(?P<year>\d{4})" + _GAP + _NAME + _GAP + _DAY,
    r"(?P<year>(?:19|20)\d\d)(?P<month>\d\d)(?P<day>\d\d)",
    r"(?P<first>\d\d)(?P<second>\d\d)(?P<year>(?:19|20)\d\d)",
)
_DATES = tuple(re.compile(r"(?<![^\W_])" + form + r"(?!\d)", re.IGNORECASE) for form in _FORMS)
_AROUND = re.compile(
    r"(?:[\s().,:;|-]|\d{1,2}:\d{2}(?::\d{2})?|[ap]\.?m\b|t(?=\d)"
    r"|(?:mon|tue(?:s)?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\b|date\b)*",
    re.IGNORECASE,
)


def read_date(text: str) -> str | None:
    """The date as YYYY-MM-DD; None where the text is none. A time of day, a week day, brackets and the word "date" may
    stand around it.

    Of two numbers before the year the first is the day, unless only the other order is a date (03/29/2018). A year of
    two digits comes last and means 1970 to 2069.
    """
    if len(text) > _LONGEST:
        return None
    text = unicodedata.normalize("NFKC", text)
    for match in _dates_in(text):
        if _AROUND.fullmatch(text[: match[0]]) and _AROUND.fullmatch(text[match[1] :]):
            return match[2]
    return None


def find_date(text: str) -> str | None:
    """The first text in `text` that reads as a date, as it stands there."""
    found = min(_dates_in(text[:1000]), default=None)
    return None if found is None else text[found[0] : found[1]]


def _dates_in(text: str) -> list[tuple[int, int, str]]:
    """(start, stop, YYYY-MM-DD) of every reading, by form."""
    return [
        (match.start(), match.end(), day)
        for form in _DATES
        for match in form.finditer(text)
        if (day := _day(match.groupdict())) is not None
    ]


def _day(parts: dict[str, str | None]) -> str | None:
    year = int(parts["year"] or 0)
    if len(parts["year"] or "") == 2:
        year += 2000 if year < 70 else 1900
    if name := parts.get("name"):
        orders = [(_MONTHS.index(name[:3].casefold()) + 1, int(parts["day"] or 0))]
    elif "first" in parts:
        first, second = int(parts["first"] or 0), int(parts["second"] or 0)
        orders = [(second, first), (first, second)]
    else:
        orders = [(int(parts["month"] or 0), int(parts["day"] or 0))]
    for month, day in orders:
        try:
            return date(year, month, day).isoformat()
        except ValueError:
            continue
    return None


# --- amounts -------------------------------------------------------------------------------------------------------

_CODES = r"(?:rm|myr|usd|eur|gbp|sgd|chf|jpy|inr|cny|aud|cad|us\$|s\$|[$€£¥₹])"
_NUMBER = r"(?:\d{1,3}(?:[,.'\s]\d{3})+(?:[.,]\s?\d{1,2})?|\d+(?:[.,]\s?\d+)?|[.,]\d{1,2})"
_AMOUNT = re.compile(
    rf"\s*(?P<open>\()?\s*(?P<sign>[-−+])?\s*(?:{_CODES}\s*\.?)?\s*(?P<sign2>[-−+])?\s*(?P<number>{_NUMBER})\s*{_CODES}?"
    r"\s*(?P<after>-)?\s*(?P<close>\))?\s*",
    re.IGNORECASE,
)
_FOUND_NUMBER = re.compile(rf"(?<![\d.,])[-−]?{_NUMBER}(?![\d])")


def read_amount(text: str) -> str | None:
    """The amount as a decimal number without superfluous zeros; None where the text is none. A currency's sign or code
    may stand before or after; "-5", "5-" and "(5)" are negative.

    Of a point and a comma the one that comes last is the decimal sign. Where only one kind stands: more than once, or a
    comma before exactly three digits, it parts thousands (1,234); otherwise it is the decimal sign (12,50 and 1.234).
    """
    if len(text) > _LONGEST:
        return None
    match = _AMOUNT.fullmatch(unicodedata.normalize("NFKC", text))
    if match is None or bool(match["open"]) != bool(match["close"]):
        return None
    value = Decimal(_plain(match["number"]))
    if match["open"] or match["after"] or "-" in (sign := (match["sign"] or match["sign2"] or "")) or "−" in sign:
        value = -value
    value = abs(value) if value == 0 else value
    digits = f"{value:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def find_amount(text: str) -> str | None:
    """The last number in `text` that reads as an amount, as it stands there."""
    found = [match[0] for match in _FOUND_NUMBER.finditer(text[-1000:]) if read_amount(match[0]) is not None]
    return found[-1] if found else None


def has_cents(text: str) -> bool:
    """Whether an amount has exactly two decimals."""
    return re.search(r"[.,]\s?\d\d(?!.*\d)", text[-_LONGEST:]) is not None


def _plain(number: str) -> str:
    """Digits with a point at most."""
    number = re.sub(r"[\s']", "", number)
    point, comma = number.rfind("."), number.rfind(",")
    if point >= 0 and comma >= 0:
        thousands = "," if point > comma else "."
    elif number.count(",") > 1 or re.fullmatch(r"\d{1,3},\d{3}", number):
        thousands = ","
    elif number.count(".") > 1:
        thousands = "."
    else:
        thousands = ""
    if thousands:
        number = number.replace(thousands, "")
    return number.replace(",", ".")


_REGISTRATION = re.compile(r"\((?:co|reg|no|[.:\s]){0,12}\d{4,12}[\s-]{0,3}[a-z]?\s?\)\W{0,3}$", re.IGNORECASE)
"""A company's number in a register, in brackets behind its name."""


def value_in(field: str, text: str) -> str:
    """From the words of an entity to the value in them: the first date in "DATE:01/02/2018"; the amount that they are, with its
    currency and sign, else the last one in "TOTAL:20.50"; a company without its number in a register ("MYNEWS SB(306295-X)").
    All of `text` where there is none."""
    match kind_of(field):
        case "date":
            found = find_date(text)
        case "amount":
            found = find_amount(text) if read_amount(text) is None else None
        case "text":
            found = _REGISTRATION.sub("", text).rstrip() if field.casefold() == "company" else None
    return found or text
