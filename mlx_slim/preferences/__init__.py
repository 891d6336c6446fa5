"""Preference tuning: DPO, IPO, ORPO, SimPO and KTO over pairs of answers or labelled answers."""
