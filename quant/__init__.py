"""Making models cheaper on one machine. Empty until requantised drafts arrive."""
