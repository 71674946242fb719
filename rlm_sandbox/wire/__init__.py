"""What host and guest say to each other: values (`codec`), messages (`messages`), frames on a stream (`frames`),
and a supervisor's orders and reports (`control`).

Standard library only and relative imports only: this package is bundled into every framed guest.
"""
