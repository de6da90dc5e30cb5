"""Tests of quantize/."""
