"""What the claims page advises: sentences, in which <task: arm> stands for that arm's score."""

ADVICE: list[str] = []
