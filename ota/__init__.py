"""Signed updates on the device: trust, fetch, stage, prove, commit or roll back."""
