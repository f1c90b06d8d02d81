"""From what the engine found to labels: decisions, votes, review, and how good they are against gold."""
