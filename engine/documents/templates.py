"""Families of synthetic documents. A template is a family's function with a style; a page is a template with values.

What varies with the template: paper, font, sizes, where blocks stand, what keys are called, how dates and amounts are
written. What varies with the page: values, which fields are missing, how many rows there are, and numbers that look like
fields and are none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from engine.documents.drawing import Align, Part, Sheet, Style
from engine.documents.invented import Values
from engine.documents.layouts import Column, Entry, block, grid, pairs, sums, table

MISSING = 0.15
"""How often an optional field is missing."""

_FONTS = (("Helvetica", "Helvetica-Bold"), ("Times-Roman", "Times-Bold"), ("Courier", "Courier-Bold"))
_PAPERS = ((595.0, 842.0), (595.0, 842.0), (612.0, 792.0))


def style(family: str, number: int) -> Style:
    """The style of template `number` of a family: the same everywhere."""
    template = f"{family}-{number:02d}"
    drawn = random.Random(template)
    narrow = family == "receipt"
    font, bold = drawn.choice(_FONTS)
    paper = (drawn.choice((204.0, 226.0, 250.0)), drawn.choice((480.0, 560.0))) if narrow else drawn.choice(_PAPERS)
    return Style(
        family=family,
        template=template,
        width=paper[0],
        height=paper[1],
        margin=drawn.uniform(8, 14) if narrow else drawn.uniform(36, 60),
        font=font,
        bold=bold,
        size=(drawn.uniform(6, 7) if font == "Courier" else drawn.uniform(7, 8.5))
        if narrow
        else drawn.uniform(8, 10.5),
        stacked=drawn.random() < 0.4 and not narrow,
        colon=drawn.choice((":", ":", "", " :")),
        capitals=drawn.random() < 0.35,
        rules=drawn.random() < 0.5,
    )


def invoice(sheet: Sheet, values: Values) -> None:
    pick, leading = sheet.style.pick, sheet.style.leading
    middle = (sheet.left + sheet.right) / 2 + 10
    sides = (sheet.left, middle) if pick("seller side", (True, False)) else (middle, sheet.left)
    top = 60.0
    sheet.put([pick("title", ("INVOICE", "Tax invoice", "Invoice", "BILL"))], sides[1], top, bold=True, scale=1.5)
    half = (sheet.right - sheet.left) / 2 - 20
    seller_texts = [([values.company()], "company"), (values.address(), "address")]
    seller = block(sheet, pick("seller key", ("", "", "From", "Seller")), seller_texts, sides[0], top, width=half)
    day = values.day()
    entries = [
        Entry(
            pick("number key", ("Invoice No", "Invoice number", "Invoice #", "Bill no.", "Document")),
            values.number(),
            "invoice_number",
        ),
        Entry(pick("date key", ("Date", "Invoice date", "Issued", "Dated")), values.written(day), "date"),
        Entry(
            pick("due key", ("Due date", "Payment due", "Pay by", "Due")), values.written(values.later(day)), "due_date"
        ),
        Entry(pick("order key", ("Order", "Your reference", "PO number")), values.number()),
    ]
    entries = [entry for entry in entries if entry.field in ("date", "invoice_number") or not values.maybe(2 * MISSING)]
    if pick("free order", (False, False, True)):
        values.random.shuffle(entries)
    dates = pairs(sheet, entries, sides[1], top + 2.2 * leading, sheet.right - middle)
    y = max(seller, dates) + leading
    buyer_x = pick("buyer side", (sheet.left, sheet.left, middle))
    buyer_texts = [([values.company()], "buyer"), (values.address(), None)]
    y = block(
        sheet, pick("buyer key", ("Bill to", "Sold to", "Customer", "Buyer")), buyer_texts, buyer_x, y, width=half
    )
    y += leading
    prices, subtotal, tax = _priced(values, rows=values.random.randrange(1, 9))
    wide = sheet.right - sheet.left
    columns = [
        Column("Description", sheet.left, 0.42 * wide),
        Column(pick("count key", ("Qty", "Units")), sheet.left + 0.52 * wide, 30, "right"),
        Column(pick("price key", ("Price", "Unit price", "Rate")), sheet.left + 0.75 * wide, 90, "right"),
        Column("Amount", sheet.right, 90, "right"),
    ]
    y = (
        table(sheet, columns, [(values.item(), str(n), values.amount(p), values.amount(n * p)) for n, p in prices], y)
        + 0.5 * leading
    )
    lines = [
        Entry(pick("subtotal key", ("Subtotal", "Net", "Sub total")), values.amount(subtotal), "subtotal"),
        Entry(pick("tax key", ("Tax", "VAT", "GST 6%", "Sales tax")), values.amount(tax), "tax"),
        Entry(
            pick("total key", ("Total", "Amount due", "Grand total", "Total payable")),
            values.amount(subtotal + tax),
            "total",
        ),
    ]
    sums(
        sheet, lines if not values.maybe(MISSING) else lines[-1:], y, key_x=sheet.left + 0.5 * wide, value_x=sheet.right
    )


def receipt(sheet: Sheet, values: Values) -> None:
    pick, leading = sheet.style.pick, sheet.style.leading
    middle, room = (sheet.left + sheet.right) / 2, sheet.right - sheet.left
    headers: list[tuple[float, Align]] = [(middle, "center"), (middle, "center"), (sheet.left, "left")]
    x, align = pick("header", headers)
    _, y = sheet.put(sheet.wrap(values.company(), room, bold=True), x, 24, field="company", bold=True, align=align)
    if not values.maybe(MISSING):
        address = [line for text in values.address() for line in sheet.wrap(text, room)]
        _, y = sheet.put(address, x, y, field="address", align=align)
    if values.maybe(0.6):
        _, y = sheet.put(
            sheet.wrap(f"{pick('phone', ('TEL', 'Tel:', 'Phone'))} {values.phone()}", room), x, y, align=align
        )
    y += 0.6 * leading
    entries = [Entry(pick("number key", ("Receipt", "Doc No", "Bill")), values.number())] if values.maybe(0.7) else []
    date_entry = [Entry(pick("date key", ("Date", "Date", "Printed")), values.written(values.day()), "date")]
    late = pick("date at the end", (False, False, True))
    y = pairs(sheet, entries if late else [*entries, *date_entry], sheet.left, y, room) + 0.6 * leading
    prices, subtotal, tax = _priced(values, rows=values.random.randrange(1, 8), high=20_000)
    for count, price in prices:
        name = sheet.wrap(values.item(), room - sheet.width("USD 9,999,999.00") - 8)
        sheet.put(name[:1], sheet.left, y)
        _, y = sheet.put([values.amount(count * price)], sheet.right, y, align="right")
    if sheet.style.rules:
        sheet.rule(y - leading + 3)
        y += 4
    total, paid = subtotal + tax, _paid(subtotal + tax)
    lines = [
        Entry(pick("subtotal key", ("Subtotal", "Sub total", "Net")), values.amount(subtotal)),
        Entry(pick("tax key", ("GST", "Tax", "VAT")), values.amount(tax)),
        Entry(pick("total key", ("Total", "TOTAL", "Amount", "To pay")), values.amount(total), "total"),
        Entry(pick("cash key", ("Cash", "Paid", "Card")), values.amount(total if values.maybe(0.4) else paid)),
        Entry(pick("change key", ("Change", "Change due")), values.amount(max(paid - total, 0))),
    ]
    kept = [line for line in lines if line.field == "total" or not values.maybe(0.35)]
    y = (
        sums(sheet, kept, y, key_x=sheet.left + pick("sum indent", (0.0, 0.2 * room)), value_x=sheet.right)
        + 0.6 * leading
    )
    if late:
        y = pairs(sheet, date_entry, sheet.left, y, room)
    sheet.put(
        sheet.wrap(pick("thanks", ("THANK YOU", "Thank you, come again", "Goods sold are not returnable")), room),
        x,
        y,
        align=align,
    )


def form(sheet: Sheet, values: Values) -> None:
    pick, leading = sheet.style.pick, sheet.style.leading
    title = pick("title", ("APPLICATION FORM", "Registration", "Patient intake", "Membership request"))
    _, y = sheet.put(
        [title], *pick("title place", ((sheet.left, 60.0), (sheet.style.width / 3, 60.0))), bold=True, scale=1.4
    )
    day = values.day()
    entries = [
        Entry(pick("name key", ("Name", "Full name", "Applicant", "Name of applicant")), values.person(), "name"),
        Entry(pick("birth key", ("Date of birth", "Born", "Birth date")), values.written(day), "birth_date"),
        Entry(pick("phone key", ("Phone", "Telephone", "Mobile")), values.phone(), "phone"),
        Entry(pick("email key", ("E-mail", "Email address")), values.email(), "email"),
        Entry(pick("address key", ("Address", "Home address", "Residence")), " ".join(values.address()), "address"),
        Entry(pick("job key", ("Occupation", "Profession")), values.occupation(), "occupation"),
        Entry(pick("employer key", ("Employer", "Company", "Organisation")), values.company(), "company"),
        Entry(pick("contact key", ("Emergency contact", "Next of kin", "Guardian")), values.person()),
        Entry(pick("second phone key", ("Contact phone", "Phone (other)")), values.phone()),
        Entry(
            pick("date key", ("Date", "Date of application", "Signed on")), values.written(values.later(day)), "date"
        ),
    ]
    random.Random(sheet.style.template).shuffle(entries)
    entries = [
        entry if entry.field == "name" or not values.maybe(MISSING) else Entry(entry.key, "") for entry in entries
    ]
    y = grid(sheet, entries, y + leading, pick("columns", (1, 2, 2))) + leading
    for answer in values.random.sample(
        ("Married [x] Single [ ]", "Married [ ] Single [x]", "Smoker: yes / no", "Form 27-B"), 2
    ):
        _, y = sheet.put([answer], sheet.left, y)


def letter(sheet: Sheet, values: Values) -> None:
    pick, leading = sheet.style.pick, sheet.style.leading
    middle = (sheet.left + sheet.right) / 2 + 20
    x, half = pick("letterhead", (sheet.left, middle)), (sheet.right - sheet.left) / 2 - 20
    y = block(sheet, "", [([values.company()], "company"), (values.address(), "address")], x, 60, width=half)
    day, name = values.day(), values.person()
    date_x = pick("date side", (sheet.left, middle))
    if early := pick("date first", (True, False)):
        _, y = sheet.put([values.written(day)], date_x, y + leading, field="date")
    y = block(sheet, "", [([name], "name"), (values.address(), None)], sheet.left, y + leading, width=half)
    if not early:
        _, y = sheet.put([values.written(day)], date_x, y + leading, field="date")
    _, y = sheet.put([f"Dear {name.split()[-1]},"], sheet.left, y + 1.5 * leading)
    low, high = sorted((values.cents(), values.cents()))
    number, due, asked = values.number(), values.later(day), values.maybe(0.5)
    sentences: list[list[Part]] = [
        [(f"Our invoice {number} of", None), (values.amount(high), "total" if asked else None),
         ("is still open." if asked else "has been paid, thank you.", None)],
        [("Please pay by", None), (f"{values.written(due)}.", "due_date")] if asked else [(values.sentence(), None)],
        [(f"You have paid {values.amount(low)} so far.", None)],
        [(values.sentence(), None)], [(values.sentence(), None)],
    ]  # fmt: skip
    values.random.shuffle(sentences)
    y = sheet.flow(
        [part for sentence in sentences for part in sentence], sheet.left, y + 0.8 * leading, sheet.right - sheet.left
    )
    _, y = sheet.put([pick("greeting", ("Sincerely,", "Kind regards,", "Yours faithfully,"))], sheet.left, y + leading)
    sheet.put([values.person()], sheet.left, y + 2 * leading)


def statement(sheet: Sheet, values: Values) -> None:
    pick, leading = sheet.style.pick, sheet.style.leading
    wide = sheet.right - sheet.left
    y = block(sheet, "", [([values.company()], "company")], sheet.left, 56, width=wide)
    _, y = sheet.put(
        [pick("title", ("Account statement", "STATEMENT OF ACCOUNT", "Your account"))],
        sheet.left,
        y + leading,
        bold=True,
    )
    start = values.day()
    end = values.later(start)
    opening = values.cents()
    moves = [values.random.choice((-1, 1)) * values.cents(high=90_000) for _ in range(values.random.randrange(2, 12))]
    while not values.mine(opening + sum(moves)):
        moves[-1] += 1
    entries = [
        Entry(pick("holder key", ("Account holder", "Customer", "Name")), values.person(), "name"),
        Entry(pick("account key", ("Account", "Account number", "IBAN")), values.number(), "account_number"),
        Entry(pick("start key", ("From", "Period from", "Start")), values.written(start), "start_date"),
        Entry(pick("end key", ("To", "Period to", "End")), values.written(end), "end_date"),
        Entry(pick("opening key", ("Opening balance", "Balance forward")), values.amount(opening), "opening_balance"),
        Entry(
            pick("closing key", ("Closing balance", "New balance")),
            values.amount(opening + sum(moves)),
            "closing_balance",
        ),
    ]
    entries = [entry for entry in entries if entry.field != "end_date" or not values.maybe(MISSING)]
    y = grid(sheet, entries, y + leading, pick("columns", (1, 2, 3))) + leading
    balance, rows = opening, []
    for move in moves:
        balance += move
        rows.append((values.written(values.later(start)), values.item(), values.amount(move), values.amount(balance)))
    columns = [
        Column("Date", sheet.left, 0.2 * wide), Column("Text", sheet.left + 0.25 * wide, 0.3 * wide),
        Column("Amount", sheet.left + 0.78 * wide, 90, "right"), Column("Balance", sheet.right, 90, "right"),
    ]  # fmt: skip
    table(sheet, columns, rows, y)


def _priced(values: Values, *, rows: int, high: int = 100_000) -> tuple[Sequence[tuple[int, int]], int, int]:
    """(count, unit price) by row, the subtotal and the tax, such that the total is the split's own."""
    rate = values.random.choice((0, 5, 6, 20))
    while True:
        prices = [(values.random.choice((1, 1, 1, 2, 3, 10)), values.cents(high=high)) for _ in range(rows)]
        subtotal = sum(count * price for count, price in prices)
        tax = round(subtotal * rate / 100)
        if values.mine(subtotal + tax):
            return prices, subtotal, tax


def _paid(total: int) -> int:
    """The total rounded up to whole tens."""
    return -(-total // 1000) * 1000


FAMILIES: dict[str, Callable[[Sheet, Values], None]] = {
    "invoice": invoice, "receipt": receipt, "form": form, "letter": letter, "statement": statement
}  # fmt: skip
