"""How long the layer takes and how much memory it needs, beside what stands next to it: `attnorm bench layer`.

A time is reported only where the result was first compared with the layer's reference in float64.
"""
