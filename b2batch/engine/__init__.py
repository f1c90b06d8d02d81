"""Requests in → tokens out, on one device: schedule, run, postprocess."""
