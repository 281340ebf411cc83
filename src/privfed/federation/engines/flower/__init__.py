"""The Flower engine: the stages of a round over SuperLink and SuperNodes.

``sites`` and ``envelope`` are what both sides share; ``site``, ``memory`` and ``policy`` are a data holder's side,
``fleet`` and ``remote`` the server's; ``grid``, ``client_app`` and ``node`` are the only modules that import Flower.
"""
