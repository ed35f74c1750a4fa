"""Publishes runs on the Hugging Face Hub and pulls adapters from there.

client    the Hub's client, and which files a repository of a run holds
card      the model card
push      from a finished run to the Hub
pull      from the Hub to a run folder
listing   the runs here and those on the Hub
"""
