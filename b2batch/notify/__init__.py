"""Webhooks: a message about the end of a job, sent so that it can neither fail nor delay the job."""
