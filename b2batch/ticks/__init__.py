"""Instants at which a job is due: cron expressions, ticks, and which of them are to be made up for."""
