"""The article's formula, y = βx, on a table of numbers: `headwater train linear`, beside the closed form."""
