"""The abdomen of phantoms: what lies where, in reference millimetres.

The origin lies in front of the first lumbar vertebra; x grows to the patient's right, y to the front, z to the
head. Numbers are places and radii of a textbook patient; the canvas moves, stretches and bends them by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autosam3d.data.phantom_canvas import Canvas, Point, ellipse, ellipsoid, rotation, smooth_min, trunk, tube

# Half axes of the abdominal cavity in reference mm; the muscle wall and the fat lie around it.
_CAVITY_X, _CAVITY_Y, _WALL = 118.0, 80.0, 11.0


def draw_abdomen(canvas: Canvas) -> None:
    """Everything, in the painter's order: what comes later covers what came before."""
    _draw_body(canvas)
    _draw_bowel(canvas)
    _draw_organs(canvas)
    _draw_bones(canvas)


def _draw_body(canvas: Canvas) -> None:
    """Table, fat, muscle wall, cavity, psoas and back muscles."""
    x, y, z = canvas.xyz
    fat_mm = canvas.rng.uniform(7, 22)
    outer = trunk(x, y, _CAVITY_X + _WALL, _CAVITY_Y + _WALL)
    skin = outer - fat_mm * (1 - 0.2 * np.cos(2 * np.arctan2(x, y)))
    table = np.hypot(x, y - 330) - 330 - _CAVITY_Y - _WALL - fat_mm - 4
    canvas.paint(np.maximum(np.abs(table - 8) - 11, np.abs(x) - 200), 60.0)  # carbon shell
    canvas.paint(np.maximum(np.abs(table - 8) - 8, np.abs(x) - 197), -930.0)  # foam
    canvas.paint(skin, -10.0)
    canvas.paint(skin + 2.5, "fat")
    canvas.paint(outer, "muscle")
    rectus = ellipsoid(canvas.xyz, (0, _CAVITY_Y + 8, 0), (62, 9, 400))
    canvas.paint(np.maximum(rectus, 3 - np.abs(x)), "muscle")
    canvas.paint(outer + _WALL, "fat")
    for side in (-1, 1):
        canvas.paint(ellipse(x - side * 31, y + 76, 30, 21), "muscle")
        width = np.clip(17 - (z + 60) * 0.14, 4, 18)
        canvas.paint(np.maximum(np.hypot(x - side * (37 - 0.05 * z), (y + 42) / 1.15) - width, z - 35), "muscle")
        canvas.paint(np.maximum(ellipse(x - side * 72, y + 62, 26, 9), z - 20), "muscle")


def _draw_bowel(canvas: Canvas) -> None:
    """Colon with stool and gas, small bowel, mesenteric vessels: what organs are mistaken for."""
    rng = canvas.rng

    def shake(points: Sequence[Point], mm: float) -> list[np.ndarray]:
        return [np.array(p) + np.append(rng.normal(0, mm, 3), 0) for p in points]

    for _ in range(14):
        start = rng.uniform((-78, 5, -122), (78, 60, -35))
        loop = [np.append(start, rng.uniform(8, 12))]
        for _ in range(4):
            step = rng.normal(0, 1, 3) * (24, 14, 15)
            loop.append(np.append(np.clip(loop[-1][:3] + step, (-85, 0, -125), (85, 62, -30)), loop[-1][3]))
        canvas.tube(loop, "bowel_wall")
        canvas.tube(loop, float(rng.choice([canvas.tissue["bowel"], 15.0, 70.0])), shrink_mm=3.0)
    for _ in range(14):
        end = rng.uniform((-70, 5, -100), (70, 50, -20))
        canvas.tube([(4, 12, -10, 2.8), (*(end * 0.5 + (0, 8, 0)), 2.2), (*end, 1.6)], "portal")
    colon = shake([
        (92, -22, -125, 20), (95, -14, -60, 21), (93, -4, -22, 18), (84, 30, -22, 17), (40, 60, -38, 16),
        (-20, 63, -42, 16), (-68, 48, -8, 15), (-92, 8, 18, 15), (-97, -22, -10, 13), (-95, -26, -70, 13),
        (-88, -15, -125, 14),
    ], 3.2)
    canvas.tube(colon, "bowel_wall")
    for a, b in itertools.pairwise(colon):
        canvas.tube([a, b], "stool", shrink_mm=3.0)
        if rng.random() < 0.5:  # gas rises to the front
            lift = np.array([0, 5, 0, -6])
            canvas.tube([a + lift, b + lift], -920.0, shrink_mm=2.0)
        for _ in range(5):
            bubble = a + rng.random() * (b - a) + np.append(rng.normal(0, 5, 3), 0)
            canvas.tube([(*bubble[:3], rng.uniform(1.5, 3.5)), (*bubble[:3], 1.5)], -600.0)
    canvas.tube(shake([(27, 38, 14, 10), (45, 24, 6, 11), (45, 6, -24, 11), (8, 0, -34, 10), (-26, 8, -20, 9)], 1.2),
                "bowel")


def _draw_organs(canvas: Canvas) -> None:
    """The 13 organs, lungs and heart, from the back of the painter's order to its front."""
    kidneys = _draw_upper_organs(canvas)
    _draw_kidneys(canvas, kidneys)
    _draw_pancreas_and_portal_veins(canvas)
    size = canvas.rng.uniform(0.75, 1.2)
    fundus, body, neck = canvas.about(58, 52, -4), canvas.about(54, 46, 10), canvas.about(46, 32, 26)
    canvas.tube([(*neck, 6 * size), (*body, 12 * size), (*fundus, 13 * size)], "gallbladder", "gallbladder")
    _draw_adrenals(canvas)
    _draw_great_vessels_and_esophagus(canvas)


@dataclass(frozen=True)
class _Kidney:
    side: str
    inward: int
    """Sign of x towards the spine."""
    centre: np.ndarray
    turn: np.ndarray
    distance: np.ndarray
    """Signed, in mm, of every voxel."""


def _place_kidneys(canvas: Canvas) -> list[_Kidney]:
    """Shapes only: the liver and the spleen make room for them."""
    rng = canvas.rng
    kidneys = []
    for side, sign in (("right", 1), ("left", -1)):
        centre, half = canvas.about(sign * 58, -36, -16 if sign > 0 else -4, mm=4), canvas.sized(27, 24, 50)
        turn = rotation((rng.normal(12, 4), sign * rng.normal(-9, 3), sign * rng.normal(-25, 6)))
        kidneys.append(_Kidney(side, -sign, centre, turn, ellipsoid(canvas.xyz, centre, half, turn)))
    return kidneys


def _draw_upper_organs(canvas: Canvas) -> list[_Kidney]:
    """Stomach, liver, spleen and chest; returns where the kidneys will be."""
    rng, xyz = canvas.rng, canvas.xyz
    x, y, z = xyz
    dome_mm = _diaphragm(canvas)
    cavity = np.maximum(trunk(x, y, _CAVITY_X - 3, _CAVITY_Y - 3), 2 - dome_mm)
    right_kidney, left_kidney = kidneys = _place_kidneys(canvas)

    stomach = [(*canvas.about(*p[:3], mm=4), p[3] * rng.uniform(0.85, 1.1)) for p in (
        (-50, -10, 82, 27), (-64, 10, 62, 30), (-62, 32, 40, 26), (-38, 48, 18, 22), (-4, 50, 10, 17), (25, 39, 14, 10),
    )]
    stomach_mm = np.maximum(tube(xyz, stomach), cavity)
    right_lobe = ellipsoid(xyz, canvas.about(58, 4, 50), canvas.sized(68, 86, 82, spread=0.05))
    left_lobe = ellipsoid(xyz, canvas.about(-8, 42, 64), canvas.sized(68, 36, 33), rotation((0, 14, 0)))
    hollow = ellipsoid(xyz, canvas.about(14, 8, -2), canvas.sized(46, 50, 44))  # room for pancreas and duodenum
    renal_bed = 0.9 * (-45 - y - 0.5 * (z - 5))  # behind and beside the kidney there is no liver
    liver_mm = smooth_min(right_lobe, left_lobe, 14.0)
    for cut in (5 - right_kidney.distance, -hollow, 40 - np.hypot(x, y + 42), renal_bed, cavity):
        liver_mm = np.maximum(liver_mm, cut)
    spleen_half = canvas.sized(29, 46, 48, spread=0.12)
    spleen_mm = ellipsoid(xyz, canvas.about(-90, -34, 52, mm=4), spleen_half, rotation((-18, 8, 12)))
    for cut in (3 - stomach_mm, 4 - left_kidney.distance, cavity):
        spleen_mm = np.maximum(spleen_mm, cut)

    canvas.paint(stomach_mm, "stomach_wall", "stomach")
    canvas.paint(stomach_mm + 5, "stomach", keep_label=True)
    gas_level_y = rng.uniform(28, 50)
    canvas.paint(np.maximum(stomach_mm + 5, gas_level_y - y), -950.0, keep_label=True)
    canvas.paint(liver_mm, "liver", "liver")
    _draw_liver_vessels(canvas, liver_mm)
    _draw_cyst(canvas, "liver", liver_mm)
    canvas.paint(spleen_mm, "spleen", "spleen")
    _draw_chest(canvas, dome_mm)
    return kidneys


def _draw_kidneys(canvas: Canvas, kidneys: list[_Kidney]) -> None:
    """Kidneys in their fat, with sinus and renal vein."""
    for kidney in kidneys:
        sinus = kidney.centre + kidney.turn @ (kidney.inward * 20, 4, 0)
        hilum = kidney.centre + kidney.turn @ (kidney.inward * 14, 4, 0)
        on_the_way = kidney.centre + np.array((kidney.inward * 32, 12, 2))
        canvas.paint(kidney.distance - 5, "fat")
        canvas.paint(kidney.distance, "kidney", f"{kidney.side}_kidney")
        canvas.paint(ellipsoid(canvas.xyz, sinus, (15, 9, 17), kidney.turn), -30.0)
        canvas.tube([(*hilum, 5), (*on_the_way, 3.5), (kidney.inward * -16, -9, kidney.centre[2] + 8, 4)], "cava")
        _draw_cyst(canvas, f"{kidney.side}_kidney", kidney.distance)


def _draw_pancreas_and_portal_veins(canvas: Canvas) -> None:
    pancreas = [(*canvas.about(*p[:3]), p[3] * canvas.rng.uniform(0.88, 1.12)) for p in (
        (29, 17, -8, 12), (27, 18, 8, 14), (8, 24, 20, 9), (-20, 18, 30, 10.5), (-46, 0, 38, 10), (-66, -16, 46, 8.5),
    )]
    canvas.tube(pancreas, "pancreas", "pancreas")
    confluence, hilum = canvas.about(9, 11, 20), canvas.about(38, 15, 48)
    behind_tail = np.array(pancreas[-1][:3]) - np.array((4, 9, -2))
    behind_body = np.array(pancreas[3][:3]) - np.array((0, 12, 0))
    right_branch, left_branch = hilum + np.array((24, -6, 8)), hilum + np.array((-20, 16, 10))
    for vein in (
        [(*behind_tail, 4.3), (*behind_body, 4.8), (*confluence, 6.5), (*hilum, 7)],
        [(*hilum, 6.5), (*right_branch, 5)],
        [(*hilum, 6), (*left_branch, 4.5)],
        [(*confluence, 6), (*canvas.about(7, 16, -8), 5.5), (*canvas.about(8, 18, -28), 5)],  # superior mesenteric
    ):
        canvas.tube(vein, "portal", "portal_and_splenic_veins")


def _draw_adrenals(canvas: Canvas) -> None:
    """Two limbs each, like an inverted V behind the cava and beside the left crus."""
    for side, sign, top in (("right", 1, (36, -22, 52)), ("left", -1, (-33, -16, 46))):
        apex = canvas.about(*top, mm=1.5)
        below = apex - np.array((0, 0, 8))
        for limb in (np.array((-sign * 2, -20, -6)), np.array((sign * 11, -15, -9))):
            organ = f"{side}_adrenal_gland"
            canvas.tube([(*apex, 3.6), (*(apex + 0.6 * limb), 3.3), (*(apex + limb), 2.8)], "adrenal", organ)
            canvas.tube([(*below, 3.4), (*(apex + limb - np.array((0, 0, 10))), 2.8)], "adrenal", organ)


def _draw_great_vessels_and_esophagus(canvas: Canvas) -> None:
    rng = canvas.rng

    def course(*points: tuple[float, float, float, float], calibre: float = 1.0) -> list[tuple]:
        return [(*canvas.about(*p[:3], mm=1.5), p[3] * calibre) for p in points]

    canvas.tube(course((20, 4, 104, 11), (24, -4, 70, 12), (23, -10, 30, 11.5), (19, -12, -20, 11), (17, -15, -90, 10),
                       calibre=rng.uniform(0.85, 1.12)), "cava", "inferior_vena_cava")
    gullet = [*course((-7, -8, 132, 8.5), (-11, -7, 104, 8), (-24, -4, 84, 9)), (-36, -6, 80, 8)]
    canvas.tube(gullet, "esophagus", "esophagus")
    if rng.random() < 0.5:  # swallowed air
        canvas.tube([(*p[:3], 2.2) for p in gullet[:2]], -500.0, keep_label=True)
    calibre = rng.uniform(0.85, 1.2)
    aorta = course((-20, -27, 132, 11.5), (-17, -21, 80, 11), (-11, -15, 30, 10), (-7, -14, -20, 9),
                   (-4, -13, -88, 8.5), calibre=calibre)
    for sign in (-1, 1):  # iliac arteries are not labelled
        canvas.tube([(*aorta[-1][:3], 6.5 * calibre), (sign * 26, -22, -132, 5.5 * calibre)], "blood")
    for z_mm, bend in ((34, (-9, 6, 32)), (22, (-7, 4, 8))):  # coeliac trunk, superior mesenteric artery
        canvas.tube([(-11, -14, z_mm, 3), (*bend, 3), (bend[0] + 4, bend[1] + 4, bend[2] - 30, 2.6)], "blood")
    canvas.tube(aorta, "blood", "aorta")


def _draw_liver_vessels(canvas: Canvas, liver_mm: np.ndarray) -> None:
    """Hepatic veins and portal branches: brighter, but part of the liver."""
    veins = [
        [(22, -2, 96, 6), (62, -6, 82, 4.5), (95, -12, 55, 2.5)],
        [(22, 2, 96, 6), (40, 30, 78, 4), (55, 52, 50, 2.5)],
        [(20, 4, 94, 5), (-5, 28, 80, 3.5), (-35, 44, 66, 2)],
    ]
    veins += [[(50, 10, 55, 4), (*canvas.rng.uniform((50, -50, 5), (105, 50, 90)), 2)] for _ in range(6)]
    for vein in veins:
        where = canvas.near(np.array(vein)[:, :3], 12)
        inside = np.maximum(tube(canvas.xyz[:, where], vein), liver_mm[where] + 4)
        canvas.paint(inside, canvas.tissue["liver"] + 38, where=where, keep_label=True)


def _diaphragm(canvas: Canvas) -> np.ndarray:
    """Distance in mm below (positive) or above (negative) the two domes that part the abdomen from the lungs."""
    x, y, z = canvas.xyz
    back = np.where(y < 5, 62.0, 26.0)
    dome = np.full_like(z, -np.inf)
    for sign, apex in ((1, canvas.rng.uniform(94, 108)), (-1, canvas.rng.uniform(88, 102))):
        outward = x * sign - 58
        flank = np.where(outward > 0, 36.0, 14.0)  # steep at the chest wall, shallow towards the central tendon
        dome = np.maximum(dome, apex - flank * (outward / 60) ** 2 - back * ((y - 5) / 82) ** 2)
    return (dome - z) * 0.75  # the domes slope: vertical millimetres overstate the distance


def _draw_chest(canvas: Canvas, dome_mm: np.ndarray) -> None:
    """Lung bases above the diaphragm, the crura, and the heart between the lungs."""
    rng = canvas.rng
    x, y, z = canvas.xyz
    between = ellipse(x + 4, y - 12, 34, 66)
    chest = np.maximum(trunk(x, y, _CAVITY_X - 1, _CAVITY_Y - 1), dome_mm)
    for solid in (ellipse(np.abs(x) - 31, y + 76, 30, 21), ellipse(x, y + 42, 26, 20), ellipse(x, y + 68, 20, 20)):
        chest = np.maximum(chest, 3 - solid)
    lungs = np.maximum(chest, -between)
    canvas.paint(lungs, "lung")
    for _ in range(30):  # vessels
        end = rng.uniform((-105, -70, 70), (105, 60, 130))
        start = end + rng.normal(0, 8, 3) + np.array((-0.35 * end[0], 0, 12))
        where = canvas.near(np.array([start, end]), 12)
        vessel = tube(canvas.xyz[:, where], [(*start, 2.6), (*end, 1.4)])
        canvas.paint(np.maximum(vessel, lungs[where]), 20.0, where=where)
    canvas.paint(np.maximum(np.maximum(chest, between + 3), 84 - z), "fat")
    centre = np.array((-22, 34, 132)) + rng.normal(0, 4, 3)
    canvas.paint(ellipsoid(canvas.xyz, centre, (58, 44, 40)), "muscle")
    canvas.paint(ellipsoid(canvas.xyz, centre, (48, 34, 30)), "blood")
    for sign in (-1, 1):
        canvas.tube([(sign * 17, -22, 70, 7), (sign * 17, -24, 20, 6), (sign * 12, -25, -15, 3)], "muscle")


def _draw_cyst(canvas: Canvas, organ: str, distance: np.ndarray) -> None:
    """A cyst in about every third organ; it stays a part of it."""
    rng = canvas.rng
    deep = np.flatnonzero((canvas.labels == canvas.label_map.index(organ)) & (distance < -6))
    if rng.random() < 0.35 and len(deep):
        centre, radius = canvas.xyz[:, rng.choice(deep)], rng.uniform(4, 12)
        where = canvas.near(centre[None], radius + 2 * canvas.edge_mm)
        ball = np.linalg.norm(canvas.xyz[:, where] - centre[:, None], axis=0) - radius
        canvas.paint(np.maximum(ball, distance[where]), "cyst", where=where, keep_label=True)


def _draw_bones(canvas: Canvas) -> None:
    """Vertebrae with discs, canal and processes; ribs that slope down to the front and end at the costal margin."""
    x, y, z = canvas.xyz
    level_mm, phase_mm = 36.0, canvas.rng.uniform(0, 36)
    within = (z + phase_mm) % level_mm - level_mm / 2  # 0 in the middle of a vertebra, +-18 in the disc
    body = ellipse(x, y + 42 + 0.0006 * z**2, 23, 17)
    disc = 14 - np.abs(within)
    canvas.paint(body, "disc")
    canvas.paint(np.maximum(body, -disc), "cortex")
    canvas.paint(np.maximum(body + 3, 2.5 - disc), "marrow")
    spinous = np.maximum(np.abs(x) - 4, np.maximum(np.abs(y + 90) - 13, np.abs(within + 4) - 11))
    transverse = np.maximum(np.hypot((y + 66), within - 4) - 5.5, np.abs(x) - 36)
    arch = np.maximum(np.abs(np.hypot(x, y + 68) - 13) - 4.5, np.abs(within) - 13)
    for part in (spinous, transverse, arch):
        canvas.paint(part, "cortex")
        canvas.paint(part + 3, "marrow")
    canvas.paint(np.hypot(x / 1.15, y + 68) - 8.5, "cord")
    # Ribs: a family of slanted rings in the wall, cut off below the costal margin.
    around = np.arctan2(np.abs(x), -y)  # 0 at the back, pi at the front
    along = (z + 34 * around + canvas.rng.uniform(0, 28)) % 28 - 14
    margin = 22 + 28 * np.clip(around - 0.6, 0, 2.6) - z
    in_wall = trunk(x, y, _CAVITY_X + _WALL * 0.45, _CAVITY_Y + _WALL * 0.45)
    ribs = np.maximum(np.hypot(in_wall * 1.5, along) - 6.5, np.maximum(margin, 0.35 - around))
    ribs = np.maximum(ribs, (around - 2.5) * 60)
    canvas.paint(ribs, "cortex")
    canvas.paint(ribs + 3, "marrow")
