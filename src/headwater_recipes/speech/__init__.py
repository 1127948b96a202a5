"""``headwater train speech``: which language is spoken, told of people who were never heard before."""
