"""Hosts: how adapters get into models, one file per host library, through its public extension points."""
