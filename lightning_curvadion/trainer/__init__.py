"""Everything that knows about Lightning's Trainer. Imports ``sync`` and ``optim``."""
