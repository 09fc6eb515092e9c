"""The functions of the numbered files, faster, and what torch asks of their operators."""
