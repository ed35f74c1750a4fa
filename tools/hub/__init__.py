"""Publishes runs on the Hugging Face Hub and brings adapters from there.

client    the Hub's client, and which files a repository of a run holds
card      what is published: the model card
push      a finished run to the Hub
pull      an adapter from the Hub to a run folder
listing   the runs here and those on the Hub
"""
