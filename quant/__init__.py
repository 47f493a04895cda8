"""Making models cheaper on one machine: drafts in faster types, drafts with a smaller vocabulary."""
