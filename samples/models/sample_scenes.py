"""Short animated clips, drawn by ourselves, to train and to test the bundled sample model.

A clip is a pure function of its seed: `seed % len(KINDS)` picks the kind of scene, a hash of the seed everything else.
Shapes are signed distance functions, painted back to front with an edge about one pixel soft, for a whole batch of
clips at once, on whatever device the seeds are sent to.

What happens next can always be told from the first frame and the motion bucket: things go the way they face, wheels
roll, bobs start at rest, the rest turns clockwise or drifts to the right, and the speed is proportional to the bucket.

Coordinates: x to the right, y down, the picture spans -1..1. Distances are `[N, F or 1, H or 1, W or 1]`, colours
`[N, 1, 3, 1, 1]`, the canvas `[N, F or 1, 3, H, W]`: whatever stands still is painted once, not once per frame.

    python samples/models/sample_scenes.py --sheet scenes.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

FRAMES = 14
SIZE = 128
SLOWEST, FASTEST = 16, 255
HELD_OUT = 2**31
"""Seeds from here on belong to the held-out scenes; training draws below."""

TURN = 2 * math.pi


# ------------------------------------------------------------------ chance


class Dice:
    """Random numbers that depend on `(seed, how many were drawn before)` alone: the same on every device."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds
        self.rolls = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """`[N, 1, 1, 1]`, uniform between `low` and `high` (the lowbias32 hash of Ellis, 2018)."""
        self.rolls += 1
        mask = 0xFFFFFFFF
        bits = (self.seeds * 0x9E3779B1 + self.rolls * 0x85EBCA77) & mask
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = ((bits ^ (bits >> shift)) * factor) & mask
        bits = bits ^ (bits >> 16)
        unit = (bits.double() / 2**32).float().view(-1, 1, 1, 1)
        return low + (high - low) * unit

    def chance(self, probability: float) -> Tensor:
        """`[N, 1, 1, 1]`, 1 with the given probability, else 0."""
        return (self.uniform() < probability).float()

    def side(self) -> Tensor:
        """`[N, 1, 1, 1]`, -1 or 1."""
        return 2 * self.chance(0.5) - 1

    def colour(self, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]) -> Tensor:
        """`[N, 1, 3, 1, 1]`, RGB of a random hue (in turns), saturation and value."""
        return hsv(self.uniform(*hue), self.uniform(*saturation), self.uniform(*value))

    def vivid(self) -> Tensor:
        """`[N, 1, 3, 1, 1]`, a strong colour of any hue."""
        return self.colour((0, 1), (0.7, 0.95), (0.75, 1))

    def warm(self) -> Tensor:
        """`[N, 1, 3, 1, 1]`, a strong colour that stands out from sky, sea and grass."""
        return self.colour((-0.12, 0.13), (0.75, 0.95), (0.8, 1))


def hsv(hue: Tensor, saturation: Tensor | float, value: Tensor | float) -> Tensor:
    """RGB `[N, 1, 3, 1, 1]` of HSV, each `[N, 1, 1, 1]` or, but for the hue, a number."""
    saturation, value = hue * 0 + saturation, hue * 0 + value
    k = (5 - 2 * torch.arange(3, device=hue.device).view(1, 1, 3, 1, 1) + 6 * hue.unsqueeze(2)) % 6
    dip = torch.minimum(k, 4 - k).clamp(0, 1)
    return value.unsqueeze(2) * (1 - saturation.unsqueeze(2) * dip)


# ------------------------------------------------------------------ shapes: distance to the edge, negative inside


def rotate(x: Tensor, y: Tensor, angle: Tensor | float) -> tuple[Tensor, Tensor]:
    """The coordinates as seen by an object that is turned clockwise by `angle`."""
    if isinstance(angle, float):
        cos, sin = math.cos(angle), math.sin(angle)
    else:
        cos, sin = angle.cos(), angle.sin()
    return cos * x + sin * y, cos * y - sin * x


def disc(x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    return torch.hypot(x, y) - radius


def oval(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """First-order distance: the implicit function over the length of its gradient."""
    scaled = torch.hypot(x / rx, y / ry)
    return scaled * (scaled - 1) / torch.hypot(x / rx**2, y / ry**2).clamp_min(1e-4)


def box(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float, corner: Tensor | float = 0.0) -> Tensor:
    dx, dy = x.abs() - (rx - corner), y.abs() - (ry - corner)
    return torch.hypot(dx.clamp_min(0), dy.clamp_min(0)) + torch.maximum(dx, dy).clamp_max(0) - corner


def rod(x: Tensor, y: Tensor, length: Tensor | float, thickness: Tensor | float) -> Tensor:
    """From the origin straight down."""
    return torch.hypot(x, y - torch.minimum(y.clamp_min(0), y * 0 + length)) - thickness


def wedge(x: Tensor, y: Tensor, half_width: Tensor | float, height: Tensor | float) -> Tensor:
    """Triangle with its tip at the origin and its base `height` below."""
    slope = half_width / height
    return torch.maximum((x.abs() - slope * y) / (1 + slope**2) ** 0.5, y - height)


def cloud(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    puffs = [disc(x + dx * radius, y + dy * radius, r * radius) for dx, dy, r in ((-1, 0, 0.6), (0, 0.25, 0.85))]
    puffs.append(disc(x + 0.95 * radius, y, 0.65 * radius))
    return torch.maximum(torch.stack(puffs).amin(0), y - 0.45 * radius)


# ------------------------------------------------------------------ canvas


class Canvas:
    """The picture so far, and the clock: `time` `[N, F, 1, 1]` is `speed * frame / 13`, 0..1 at full speed."""

    def __init__(self, speed: Tensor, frames: int, size: int) -> None:
        pixels = (torch.arange(size, device=speed.device) + 0.5) * (2 / size) - 1
        self.x = pixels.view(1, 1, 1, -1)
        self.y = pixels.view(1, 1, -1, 1)
        self.pixel = 2 / size
        self.time = speed * torch.arange(frames, device=speed.device).view(1, -1, 1, 1) / (FRAMES - 1)
        self.rgb = torch.zeros(len(speed), 1, 3, size, size, device=speed.device)

    def paint(self, distance: Tensor, colour: Tensor, opacity: Tensor | float = 1.0) -> None:
        edge = (0.5 - distance / (1.5 * self.pixel)).clamp(0, 1)
        cover = edge * edge * (3 - 2 * edge) * opacity
        self.rgb = self.rgb + cover.unsqueeze(2) * (colour - self.rgb)

    def gradient(self, top: Tensor, bottom: Tensor, horizon: float = 1.0) -> None:
        mix = ((self.y + 1) / (1 + horizon)).clamp(0, 1).unsqueeze(2)
        self.rgb = (top + mix * (bottom - top)).expand_as(self.rgb)

    def at(self, x: Tensor | float, y: Tensor | float) -> tuple[Tensor, Tensor]:
        """The grid as seen from the point `(x, y)`."""
        return self.x - x, self.y - y


def grey(canvas: Canvas, value: float) -> Tensor:
    return torch.full((1, 1, 3, 1, 1), value, device=canvas.rgb.device)


def sky(canvas: Canvas, dice: Dice, sunny: bool = False) -> None:
    """Daylight, dusk or dawn, sometimes with a pale moon."""
    hue = dice.uniform(0.52, 0.64)
    top = hsv(hue, dice.uniform(0.4, 0.75), dice.uniform(0.7, 0.95))
    bottom = dice.colour((0.02, 0.18), (0.05, 0.3), (0.9, 1))
    canvas.gradient(top, bottom)
    moon = disc(*canvas.at(dice.uniform(-0.8, 0.8), -0.75), 0.16)
    canvas.paint(moon, grey(canvas, 1.0), 0.6 * dice.chance(0.5 * (not sunny)))


def hills(canvas: Canvas, dice: Dice, level: float) -> None:
    """Two rows of rolling ground, the nearer one darker."""
    hue, phase = dice.uniform(0.22, 0.4), dice.uniform(0, TURN)
    for row, (rise, value) in enumerate(((0.28, 0.72), (0.1, 0.58))):
        waves = (canvas.x * dice.uniform(1.5, 4) + phase + 2.0 * row).sin()
        canvas.paint(level - rise + 0.1 * waves - canvas.y, hsv(hue, 0.5, value))


def stars(canvas: Canvas, dice: Dice, count: int = 14) -> None:
    top = dice.colour((0.6, 0.85), (0.6, 0.9), (0.08, 0.25))
    canvas.gradient(top, dice.colour((0.55, 0.9), (0.5, 0.8), (0.2, 0.45)))
    for _ in range(count):
        place = canvas.at(dice.uniform(-1, 1), dice.uniform(-1, 1))
        canvas.paint(disc(*place, dice.uniform(0.01, 0.025)), grey(canvas, 0.95))


# ------------------------------------------------------------------ scenes


def car(canvas: Canvas, dice: Dice) -> None:
    """Cars drive the way they face; their wheels roll."""
    sky(canvas, dice)
    hills(canvas, dice, 0.3)
    canvas.paint(0.2 - canvas.y, grey(canvas, 0.36))
    dashes = ((canvas.x * 2.5) % 1.0 - 0.5).abs() / 2.5 - 0.11
    canvas.paint(torch.maximum(dashes, (canvas.y - 0.56).abs() - 0.02), grey(canvas, 0.95))
    for road, scale, present in ((0.4, 0.75, dice.chance(0.4)), (0.8, 1.0, 1.0)):
        facing = dice.side()
        size = scale * dice.uniform(0.36, 0.46)
        start = -facing * dice.uniform(0.3, 0.55)
        travel = 1.2 * scale * canvas.time
        body = dice.vivid()
        wheel = 0.3 * size
        x, y = canvas.at(start + facing * travel, road - wheel)
        x = x * facing  # the front of the car is at positive x
        canvas.paint(oval(x, y - wheel, 1.05 * size, 0.1 * size), grey(canvas, 0.12), 0.5 * present)
        canvas.paint(box(x + 0.12 * size, y + 0.62 * size, 0.55 * size, 0.34 * size, 0.18 * size), body * 0.8, present)
        for window in (-0.38, 0.14):
            pane = box(x - window * size, y + 0.64 * size, 0.21 * size, 0.19 * size, 0.06 * size)
            canvas.paint(pane, grey(canvas, 0.93), present)
        canvas.paint(box(x, y + 0.2 * size, size, 0.3 * size, 0.14 * size), body, present)
        lamp = disc(x - 0.9 * size, y + 0.25 * size, 0.1 * size)
        canvas.paint(lamp, dice.colour((0.13, 0.16), (0.5, 0.6), (1, 1)), present)
        for axle in (-0.56, 0.56):
            hub_x, hub_y = rotate(x - axle * size, y, travel / wheel)
            canvas.paint(disc(hub_x, hub_y, wheel), grey(canvas, 0.08), present)
            canvas.paint(disc(hub_x, hub_y, 0.62 * wheel), grey(canvas, 0.8), present)
            canvas.paint(box(hub_x, hub_y, 0.62 * wheel, 0.13 * wheel), grey(canvas, 0.1), present)


def fish(canvas: Canvas, dice: Dice) -> None:
    """Fish swim the way they face, with a waving tail, past weeds and rising bubbles."""
    hue = dice.uniform(0.48, 0.62)
    canvas.gradient(hsv(hue, 0.45, 0.9), hsv(hue, 0.85, 0.4))
    sand = 0.78 + 0.06 * (canvas.x * 4 + dice.uniform(0, TURN)).sin()
    canvas.paint(sand - canvas.y, dice.colour((0.1, 0.13), (0.35, 0.45), (0.75, 0.85)))
    for _ in range(2):
        root, bend = dice.uniform(-0.9, 0.9), dice.uniform(5, 8)
        sway = 0.06 * (bend * canvas.y).sin()
        blade = torch.maximum((canvas.x - root - sway).abs() - 0.045, dice.uniform(0, 0.4) - canvas.y)
        canvas.paint(torch.maximum(blade, canvas.y - 0.85), dice.colour((0.3, 0.4), (0.6, 0.8), (0.35, 0.6)))
    for _ in range(3):
        x, y = canvas.at(dice.uniform(-0.9, 0.9), dice.uniform(-0.2, 0.9) - 0.6 * canvas.time)
        radius = dice.uniform(0.04, 0.07)
        canvas.paint(disc(x, y, radius), grey(canvas, 1.0), 0.55)
    for depth, scale, present in ((-0.45, 0.75, dice.chance(0.5)), (0.2, 1.0, 1.0)):
        facing = dice.side()
        size = scale * dice.uniform(0.36, 0.46)
        skin = dice.warm()
        stripe = dice.colour((0, 1), (0, 0.25), (0.9, 1))
        place = facing * (1.1 * scale * canvas.time - dice.uniform(0.3, 0.55))
        x, y = canvas.at(place, depth + dice.uniform(-0.15, 0.15))
        x = x * facing
        tail_x, tail_y = rotate(x + 0.75 * size, y, 0.6 * (3 * TURN * canvas.time).sin())
        canvas.paint(wedge(tail_y, -tail_x, 0.5 * size, 0.7 * size), skin * 0.8, present)
        canvas.paint(wedge(x, y + 0.85 * size, 0.35 * size, 0.5 * size), skin * 0.8, present)
        shape = oval(x, y, size, 0.58 * size)
        canvas.paint(shape, skin, present)
        for band in (-0.35, 0.15):
            canvas.paint(torch.maximum(shape, (x - band * size).abs() - 0.09 * size), stripe, present)
        canvas.paint(disc(x - 0.6 * size, y + 0.12 * size, 0.15 * size), grey(canvas, 1.0), present)
        canvas.paint(disc(x - 0.64 * size, y + 0.12 * size, 0.08 * size), grey(canvas, 0.05), present)


def bounce(time: Tensor, height: Tensor, gravity: float, restitution: float, bounces: int = 4) -> Tensor:
    """Height above the floor of a ball that is let go at `height`."""
    landing = (2 * height / gravity).sqrt()
    speed = gravity * landing
    result = height - 0.5 * gravity * time**2
    for _ in range(bounces):
        speed = restitution * speed
        since = time - landing
        result = torch.where(since >= 0, speed * since - 0.5 * gravity * since**2, result)
        landing = landing + 2 * speed / gravity
    return torch.where(time >= landing, torch.zeros_like(result), result)


def ball(canvas: Canvas, dice: Dice) -> None:
    """Balls fall from where they are and bounce; their shadows wait on a chequered or striped floor."""
    wall = dice.colour((0, 1), (0.15, 0.4), (0.75, 0.95))
    canvas.gradient(wall, wall * 0.85)
    width = dice.uniform(0.3, 0.6)
    stripes = ((canvas.x / width) % 1.0 - 0.5).abs() * width - 0.25 * width
    canvas.paint(stripes + 0 * canvas.y, wall * 0.88, dice.chance(0.6))
    floor = dice.colour((0, 1), (0.2, 0.5), (0.4, 0.6))
    canvas.paint(0.5 - canvas.y, floor)
    # One tile is 1 high in `depth`; its sides meet at the vanishing point (0, 0.2).
    depth = 0.9 / (canvas.y - 0.2).clamp_min(0.05)
    tiles = (torch.sin(depth * 5) * torch.sin(canvas.x * depth * 4)) * 0.08
    canvas.paint(torch.maximum(tiles, 0.5 - canvas.y), floor * 0.72, dice.chance(0.6))
    twins = dice.chance(0.5)
    place = dice.side() * dice.uniform(0.42, 0.5)
    for centre, present in ((place * (0.35 + 0.65 * twins), 1.0), (-place, twins)):
        radius = dice.uniform(0.2, 0.3)
        height = dice.uniform(0.5, 1.1)
        lift = bounce(1.9 * canvas.time, height, gravity=2.6, restitution=0.8)
        colour, patch = dice.vivid(), grey(canvas, 0.97)
        ground = 0.75
        shadow = oval(*canvas.at(centre, ground), radius * (1 - 0.35 * lift), 0.06)
        canvas.paint(shadow, grey(canvas, 0.05), 0.5 * present)
        x, y = canvas.at(centre, ground - radius - lift)
        x, y = rotate(x, y, dice.uniform(0, TURN))
        canvas.paint(disc(x, y, radius), colour, present)
        sectors = torch.sin(3 * torch.atan2(y, x)) * torch.hypot(x, y) / 3
        canvas.paint(torch.maximum(disc(x, y, radius - 0.01), sectors), patch, present)
        canvas.paint(disc(x, y, 0.22 * radius), colour, present)


def pendulum(canvas: Canvas, dice: Dice) -> None:
    """Pendulums swing, from rest at their extreme."""
    wall = dice.colour((0, 1), (0.1, 0.35), (0.8, 0.98))
    canvas.gradient(wall, wall * 0.8)
    width = dice.uniform(0.16, 0.3)
    slant = (canvas.x + canvas.y * dice.side()) / width
    canvas.paint(((slant % 1.0) - 0.5).abs() * width - 0.22 * width, wall * 0.9, dice.chance(0.6))
    beam = dice.colour((0.04, 0.1), (0.5, 0.7), (0.3, 0.5))
    canvas.paint(box(*canvas.at(0.0, -0.88), 0.85, 0.07, 0.03), beam)
    pair = dice.chance(0.4)
    spread = dice.uniform(0.36, 0.42)
    for side, present in ((-1, 1.0), (1, pair)):
        amplitude = dice.side() * dice.uniform(0.55, 0.95) * (1 - 0.45 * pair)
        length = dice.uniform(0.95, 1.25)
        x, y = canvas.at(spread * side * pair, -0.84)
        x, y = rotate(x, y, -amplitude * (0.9 * TURN * canvas.time).cos())
        canvas.paint(rod(x, y, length, 0.028), grey(canvas, 0.2), present)
        radius = dice.uniform(0.2, 0.27)
        colour = dice.vivid()
        canvas.paint(disc(x, y - length, radius), colour * 0.6, present)
        canvas.paint(disc(x, y - length, 0.8 * radius), colour, present)
        canvas.paint(disc(x, y - length, 0.32 * radius), grey(canvas, 1.0), present)


def windmill(canvas: Canvas, dice: Dice) -> None:
    """Windmills turn clockwise; one sail has another colour."""
    sky(canvas, dice)
    hills(canvas, dice, 0.65)
    pair = dice.chance(0.35)
    side = dice.side()
    for place, ratio, present in ((0.55, 0.7, pair), (-0.35, 1.0, 1.0)):
        size = ratio * dice.uniform(0.55, 0.68)
        centre = side * place * (0.2 + 0.8 * pair)
        hub = -0.25 + 0.35 * (1 - ratio) + dice.uniform(-0.05, 0.05)
        x, y = canvas.at(centre, hub)
        stone = dice.colour((0.02, 0.12), (0.1, 0.45), (0.75, 0.95))
        tower = torch.maximum(x.abs() - (0.13 + 0.12 * y) * (ratio + 0.3), (y - 0.5).abs() - 0.55)
        canvas.paint(tower, stone, present)
        canvas.paint(box(x, y - 0.9, 0.06, 0.15, 0.05), stone * 0.45, present)
        canvas.paint(wedge(x, y + 0.24, 0.2 * ratio, 0.22), dice.warm() * 0.8, present)
        sail, marked = grey(canvas, 0.98), dice.vivid()
        angle = dice.uniform(0, TURN) + 0.75 * TURN * canvas.time
        for quarter in range(4):
            blade_x, blade_y = rotate(x, y, angle + quarter * TURN / 4)
            canvas.paint(rod(blade_x, blade_y, size, 0.022), grey(canvas, 0.25), present)
            cloth = box(blade_x - 0.09 * ratio, blade_y - 0.6 * size, 0.085 * ratio, 0.38 * size, 0.02)
            canvas.paint(cloth, marked if quarter == 0 else sail, present)
        canvas.paint(disc(x, y, 0.06), grey(canvas, 0.2), present)


def balloon(canvas: Canvas, dice: Dice) -> None:
    """Hot-air balloons rise and sway a little, to the right first."""
    sky(canvas, dice)
    for _ in range(2):
        place = canvas.at(dice.uniform(-0.9, 0.9), dice.uniform(-0.7, 0.3))
        canvas.paint(cloud(*place, dice.uniform(0.15, 0.25)), grey(canvas, 1.0), 0.85)
    hills(canvas, dice, 0.95)
    pair = dice.chance(0.4)
    side = dice.side()
    for place, ratio, present in ((0.52, 0.7, pair), (-0.4, 1.0, 1.0)):
        size = ratio * dice.uniform(0.34, 0.44)
        colour, other = dice.vivid(), dice.colour((0, 1), (0, 0.3), (0.9, 1))
        sway = 0.1 * (TURN * canvas.time).sin()
        height = dice.uniform(0.1, 0.35) - 0.95 * ratio * canvas.time
        x, y = canvas.at(side * place * (0.2 + 0.8 * pair) + sway, height)
        for rope in (-1, 1):
            rope_x, rope_y = rotate(x - rope * 0.5 * size, y - 0.7 * size, rope * 0.3)
            canvas.paint(rod(rope_x, rope_y, 0.95 * size, 0.012), grey(canvas, 0.25), present)
        basket = box(x, y - 1.75 * size, 0.25 * size, 0.2 * size, 0.05 * size)
        canvas.paint(basket, dice.colour((0.06, 0.09), (0.6, 0.7), (0.45, 0.6)), present)
        # The envelope: a disc that narrows towards the basket.
        skin = disc(x * (1 + 0.5 * (y / size).clamp(0, 1.2) ** 2), y * 0.92, size)
        canvas.paint(skin, colour, present)
        bulge = (1 - (y / (1.15 * size)) ** 2).clamp_min(0.02).sqrt()
        gores = (x / bulge / size).clamp(-1, 1).asin() / 0.45
        canvas.paint(torch.maximum(skin, (gores % 2.0 - 1).abs() * 0.3 * size - 0.15 * size), other, present)


def boat(canvas: Canvas, dice: Dice) -> None:
    """Boats rock where they float on waves that travel to the right."""
    sky(canvas, dice)
    hue = dice.uniform(0.52, 0.62)
    number, phase = dice.uniform(4, 6), dice.uniform(0, TURN)
    swell = dice.uniform(0.08, 0.13)
    angle = phase - 1.3 * TURN * canvas.time

    def water(x: Tensor) -> Tensor:
        return swell * (number * x + angle).sin()

    far = 0.12 + 0.6 * swell * (1.4 * number * canvas.x + 1.3 + angle).sin()
    canvas.paint(far - canvas.y, hsv(hue, 0.5, 0.75))
    pair = dice.chance(0.35)
    for place, ratio, present in ((0.55, 0.7, pair), (-0.3, 1.0, 1.0)):
        facing = dice.side()
        size = ratio * dice.uniform(0.42, 0.52)
        centre = place * (0.3 + 0.7 * pair)
        slope = swell * number * (number * centre + angle).cos()
        x, y = canvas.at(centre, 0.3 + water(centre))
        x, y = rotate(x, y, 0.7 * slope.atan())
        x = x * facing
        mast = box(x, y + 0.95 * size, 0.03, 0.95 * size)
        canvas.paint(mast, dice.colour((0.05, 0.1), (0.5, 0.6), (0.3, 0.4)), present)
        main, jib = dice.warm(), grey(canvas, 0.98)
        for sail, flip, reach in ((main, 1, 0.75), (jib, -1, 0.6)):
            along = flip * x - 0.04
            edge = torch.maximum(-along, y + 0.35 * size)
            canvas.paint(torch.maximum(edge, (along * 1.5 - reach * (y + 1.85 * size)) / 1.9), sail, present)
        hull = torch.maximum((y - 0.22 * size).abs() - 0.3 * size, x.abs() - size + 0.6 * (y + 0.08 * size))
        canvas.paint(hull, dice.vivid() * 0.75, present)
        canvas.paint(torch.maximum(hull, y + 0.02 * size), grey(canvas, 1.0), present)
    near = 0.36 + water(canvas.x)
    canvas.paint(near - canvas.y, hsv(hue, 0.75, 0.6))
    canvas.paint((canvas.y - near - 0.16).abs() - 0.025, hsv(hue, 0.4, 0.85))


def planets(canvas: Canvas, dice: Dice) -> None:
    """Planets go round their star clockwise, the inner one faster; the star stands still."""
    stars(canvas, dice)
    x, y = canvas.at(dice.uniform(-0.1, 0.1), dice.uniform(-0.1, 0.1))
    tilt = dice.uniform(0.6, 1.0)
    for present, low, high, laps in ((1.0, 0.45, 0.5, 0.85), (dice.chance(0.6), 0.72, 0.8, 0.55)):
        radius = dice.uniform(low, high)
        orbit = disc(x, y / tilt, radius).abs() - 0.008
        canvas.paint(orbit, grey(canvas, 0.75), 0.6 * present)
        angle = dice.uniform(0, TURN) + laps * TURN * canvas.time
        planet_x, planet_y = x - radius * angle.cos(), y - tilt * radius * angle.sin()
        size, colour = dice.uniform(0.15, 0.2), dice.vivid()
        globe = disc(planet_x, planet_y, size)
        canvas.paint(globe, colour, present)
        canvas.paint(torch.maximum(globe, (planet_y + 0.2 * planet_x).abs() - 0.3 * size), colour * 0.6, present)
        hoop_x, hoop_y = rotate(planet_x, planet_y, -0.3)
        hoop = oval(hoop_x, hoop_y, 1.6 * size, 0.45 * size).abs() - 0.02
        canvas.paint(torch.where(hoop_y > 0, hoop, hoop.maximum(-globe)), grey(canvas, 0.9), present * dice.chance(0.5))
    light = dice.colour((0.08, 0.15), (0.6, 0.85), (1, 1))
    canvas.paint(disc(x, y, 0.27), light, 0.35)
    canvas.paint(disc(x, y, 0.2), light)


def rocket(canvas: Canvas, dice: Dice) -> None:
    """Rockets climb along their nose, faster and faster, over a flame that flickers."""
    stars(canvas, dice)
    canvas.paint(disc(*canvas.at(dice.uniform(-0.8, 0.8), dice.uniform(-0.8, -0.4)), 0.15), grey(canvas, 0.85))
    ground = dice.colour((0, 0.12), (0.2, 0.5), (0.35, 0.55))
    canvas.paint(0.88 + 0.05 * (canvas.x * 3 + dice.uniform(0, TURN)).sin() - canvas.y, ground)
    pair = dice.chance(0.35)
    side = dice.side()
    for place, ratio, present in ((0.5, 0.7, pair), (-0.4, 1.0, 1.0)):
        size = ratio * dice.uniform(0.4, 0.48)
        lean = side * math.copysign(1, place) * dice.uniform(-0.1, 0.35)
        climb = ratio * (0.5 * canvas.time + 0.6 * canvas.time**2)
        x, y = canvas.at(
            side * place * (0.25 + 0.75 * pair) + lean.sin() * climb,
            dice.uniform(0.2, 0.35) - lean.cos() * climb,
        )
        x, y = rotate(x, y, lean)
        colour = dice.vivid()
        burn = size * (0.65 + 0.2 * (3 * TURN * canvas.time).sin())
        flame = oval(x, y - 0.85 * size, 0.22 * size, burn)
        canvas.paint(torch.maximum(flame, 0.8 * size - y), dice.colour((0.05, 0.09), (0.85, 0.95), (1, 1)), present)
        core = oval(x, y - 0.85 * size, 0.12 * size, 0.6 * burn)
        canvas.paint(torch.maximum(core, 0.8 * size - y), dice.colour((0.14, 0.16), (0.4, 0.6), (1, 1)), present)
        fins = wedge(x, y - 0.05 * size, 0.62 * size, 0.85 * size)
        canvas.paint(fins, colour * 0.75, present)
        body = torch.maximum(oval(x, y, 0.36 * size, 1.1 * size), y - 0.85 * size)
        canvas.paint(body, grey(canvas, 0.93), present)
        canvas.paint(torch.maximum(body, y + 0.6 * size), colour, present)
        canvas.paint(disc(x, y + 0.18 * size, 0.19 * size), colour, present)
        canvas.paint(disc(x, y + 0.18 * size, 0.12 * size), grey(canvas, 0.2), present)


def clouds(canvas: Canvas, dice: Dice) -> None:
    """Clouds drift to the right, nearer ones faster, before a sun whose rays turn clockwise."""
    sky(canvas, dice, sunny=True)
    x, y = canvas.at(dice.uniform(-0.5, 0.5), dice.uniform(-0.4, -0.2))
    size = dice.uniform(0.24, 0.3)
    light = dice.colour((0.11, 0.15), (0.75, 0.9), (1, 1))
    turn = dice.uniform(0, TURN)
    for ray in range(8):
        ray_x, ray_y = rotate(x, y, turn + ray * TURN / 8 + 0.3 * TURN * canvas.time)
        beam = box(ray_x, ray_y - 1.5 * size, 0.1 * size, 0.27 * size, 0.08 * size)
        canvas.paint(beam, light * (0.9 if ray else 0.75))
    canvas.paint(disc(x, y, size), light)
    for height, near in ((-0.55, 0.65), (-0.05, 0.85), (0.3, 1.0)):
        drift = dice.uniform(-0.9, 0.4) + 0.9 * near * canvas.time
        place = canvas.at(drift, height + dice.uniform(-0.1, 0.1))
        canvas.paint(cloud(*place, near * dice.uniform(0.24, 0.3)), grey(canvas, 0.9 + 0.1 * near))
    hills(canvas, dice, 0.85)


KINDS: tuple[Callable[[Canvas, Dice], None], ...] = (
    car, fish, ball, windmill, balloon, boat, planets, rocket, pendulum, clouds,
)  # fmt: skip
NAMES = tuple(kind.__name__ for kind in KINDS)


def draw_clips(
    seeds: Tensor | Sequence[int],
    frames: int = FRAMES,
    size: int = SIZE,
    device: torch.device | str = "cpu",
    motion_bucket_ids: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one clip per seed.

    Args:
        seeds: `[B]`, non-negative integers; best left on the CPU, which sorts them by kind.
        frames: frames per clip; more frames go on, at the same speed.
        size: height and width in pixels.
        device: where to draw.
        motion_bucket_ids: `[B]`, to set the speed instead of leaving it to the seed.

    Returns:
        The clips, `[B, F, 3, H, W]` float in 0..1, and their motion bucket ids, `[B]` int64, both on `device`.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.int64).cpu()
    moved = seeds.to(device, non_blocking=True)
    if motion_bucket_ids is None:
        buckets = Dice(moved).uniform(SLOWEST, FASTEST).round().long().flatten()
    else:
        buckets = torch.as_tensor(motion_bucket_ids, dtype=torch.int64).to(device)
    clips = torch.empty(len(seeds), frames, 3, size, size, device=device)
    for kind, draw in enumerate(KINDS):
        members = (seeds % len(KINDS) == kind).nonzero().flatten()
        if len(members):
            members = members.to(device, non_blocking=True)
            canvas = Canvas((buckets[members] / FASTEST).view(-1, 1, 1, 1), frames, size)
            dice = Dice(moved[members])
            dice.rolls = 1  # the first roll was the bucket
            draw(canvas, dice)
            clips[members] = canvas.rgb.expand(-1, frames, -1, -1, -1)
    return clips.clamp_(0, 1), buckets


def contact_sheet(rows: Sequence[Tensor], columns: Sequence[int], gap: int = 2) -> Image.Image:
    """A picture of the frames `columns` of each clip `[F, 3, H, W]`, one row per clip."""
    strips = []
    for clip in rows:
        tiles = torch.nn.functional.pad(clip[list(columns)].float().cpu(), (0, gap, 0, gap), value=1.0)
        strips.append(torch.cat(list(tiles), dim=-1))
    sheet = torch.cat(strips, dim=-2).clamp(0, 1)
    return Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of every kind of scene.")
    parser.add_argument("--sheet", type=Path, required=True, help="PNG to write")
    parser.add_argument("--per-kind", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 7, 10, 14])
    parser.add_argument("--kinds", nargs="+", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    seeds = [len(KINDS) * (args.seed + i) + NAMES.index(name) for name in args.kinds for i in range(args.per_kind)]
    clips, _ = draw_clips(seeds)
    contact_sheet(list(clips), [frame - 1 for frame in args.frames]).save(args.sheet)


if __name__ == "__main__":
    main()
