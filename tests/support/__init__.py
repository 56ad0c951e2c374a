"""Makers and budgets that every test file shares."""
