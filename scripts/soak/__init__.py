"""A server under random load, for long: does it leak, lose or mix up anything?"""
