"""A prompt dataset → rows → work units. No torch, no ray."""
