"""Every byte that crosses the network. Imports ``optim``, never Lightning."""
