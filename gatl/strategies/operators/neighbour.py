"""Moves to a neighbour."""

import math

import numpy as np

from gatl.chromosome import Chromosome, Gene, SearchSpace, Value


def neighbour(
    chromosome: Chromosome, space: SearchSpace, step: float, rng: np.random.Generator
) -> Chromosome:
    """Move one gene or a few by about ``step`` of their range, then repair.

    One gene, drawn at random, moves, and each other with probability 1 / n. A move is
    normal in the gene's own scale (its logarithm where the gene says so) and reflected at
    the ends of the range; a whole number moves by at least 1. Moves of this kind are the
    mutation of evolution strategies (Schwefel 1981, "Numerical Optimization of Computer
    Models"), which moves all genes at once.

    Args:
        chromosome: One number for each gene of the space.
        space: The ranges.
        step: Standard deviation of a move, as a share of the gene's range, in (0, inf).
        rng: The source of chance.

    Returns:
        A canonical chromosome of the space; the same one if repair undoes the move, or
        if every gene is fixed.
    """
    free = [i for i, gene in enumerate(space.genes) if gene.low < gene.high]
    if not free:
        return space.repair(chromosome)
    moves = rng.random(len(free)) < 1 / len(free)
    moves[rng.integers(len(free))] = True
    values = list(chromosome)
    for i, hit in zip(free, moves, strict=True):
        if hit:
            values[i] = moved(space.genes[i], values[i], step, rng)
    return space.repair(values)


def moved(gene: Gene, value: Value, step: float, rng: np.random.Generator) -> float:
    """Move one gene's value, see `neighbour`.

    Args:
        gene: The gene.
        value: In its range.
        step: Standard deviation of the move, as a share of the gene's range, in (0, inf).
        rng: The source of chance.

    Returns:
        A number in the range; for a gene of whole numbers it has yet to be rounded.
    """
    low, high, x = (math.log(v) if gene.log else v for v in (gene.low, gene.high, value))
    width = high - low
    if width == 0:  # the logarithms of neighbouring numbers
        return value
    shift = rng.normal(0.0, step * width)
    if gene.kind is int and not gene.log:
        shift = math.copysign(max(abs(shift), 1.0), shift)
    ahead = (x + shift - low) % (2 * width)  # a reflected line has twice the range as its period
    y = low + min(ahead, 2 * width - ahead)
    if gene.log:
        return math.exp(y)
    if gene.kind is int and round(y) == value:  # reflected to where it came from
        return value + 1 if value < high else value - 1
    return y
