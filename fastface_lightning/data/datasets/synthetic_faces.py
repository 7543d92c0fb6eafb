"""Draw faces of invented people, so that a recogniser can be trained where there is no data.

A face is a table of numbers. Parameter p of image j of identity i is

.. math::
    p_{ij} = \\mu_p + \\sigma_p \\, z_{ip} + \\nu_p \\, z_{ijp},
    \\qquad z \\sim \\mathcal N(0, 1) \\text{ clipped to } [-2, 2],

with the mean :math:`\\mu_p`, the spread :math:`\\sigma_p` between people and the spread
:math:`\\nu_p` between images of one person. Identity lies in many small differences; pose, light,
expression, occlusion and camera change the pixels far more, so pixels alone tell nobody apart.

The features are painted on an ellipsoid that turns with the head, and the picture is aligned as
ArcFace aligns photographs: a least-squares similarity takes five (slightly misplaced) landmarks
to the template. Lengths are pixels of the 112 x 112 crop; on the head, u points right and v down
from the template's centroid, as seen from its front.
"""

import math
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..align import ARCFACE_POINTS

Plane = NDArray[Any]  # (size, size) float32, one number a pixel
Color = NDArray[Any]  # (3, 1, 1) float32, RGB in [0, 1]

# name: (mean, spread between people, spread between images). Lengths in pixels, angles in radians,
# colors in [0, 1]; what is marked (+) is there only as far as it is positive.
PARAMETERS: dict[str, tuple[float, float, float]] = {
    # bones
    "head_width": (43.0, 2.4, 0.0),
    "head_length": (60.0, 2.8, 0.0),
    "jaw": (0.18, 0.08, 0.0),
    "ear_size": (9.0, 1.6, 0.0),
    "socket": (0.22, 0.08, 0.04),
    "cheek": (0.10, 0.06, 0.03),
    # eyes
    "eye_distance": (35.2, 1.8, 0.0),
    "eye_height": (-20.4, 1.3, 0.0),
    "eye_width": (7.6, 0.8, 0.0),
    "eye_opening": (3.3, 0.5, 0.7),
    "eye_tilt": (-0.05, 0.10, 0.0),
    "iris_radius": (3.1, 0.2, 0.0),
    "iris_blue": (0.3, 0.4, 0.0),
    "iris_light": (0.35, 0.15, 0.05),
    "lid": (0.5, 0.2, 0.1),
    # brows
    "brow_gap": (9.5, 1.3, 0.9),
    "brow_width": (9.5, 1.0, 0.0),
    "brow_thickness": (1.7, 0.5, 0.0),
    "brow_arch": (1.8, 1.0, 0.5),
    "brow_tilt": (-0.04, 0.11, 0.05),
    "brow_density": (0.7, 0.15, 0.08),
    # nose
    "nose_tip": (0.0, 1.7, 0.0),
    "nose_lift": (0.22, 0.05, 0.0),
    "nose_width": (7.0, 1.2, 0.0),
    "nose_ridge": (2.6, 0.6, 0.0),
    "nose_bend": (0.0, 0.9, 0.0),
    # mouth
    "mouth_height": (20.3, 1.5, 0.0),
    "mouth_width": (14.4, 1.5, 0.8),
    "upper_lip": (2.8, 0.8, 0.2),
    "lower_lip": (3.8, 0.9, 0.2),
    "lip_red": (0.4, 0.15, 0.15),
    "chin_fold": (0.14, 0.08, 0.03),
    # skin and hair
    "skin_dark": (0.40, 0.16, 0.04),
    "skin_red": (0.0, 0.025, 0.015),
    "hair_light": (0.22, 0.13, 0.05),
    "hair_warm": (0.07, 0.05, 0.01),
    "hair_volume": (5.0, 2.5, 1.5),
    "hairline": (-50.0, 4.0, 2.0),
    "hairline_bow": (16.0, 6.0, 2.0),
    "hairline_part": (0.0, 4.0, 4.0),
    "long_hair": (-0.3, 1.0, 0.5),  # (+)
    "beard": (-0.5, 0.6, 0.3),  # (+)
    "moles": (0.35, 0.2, 0.15),  # (+)
    # expression
    "smile": (0.5, 0.3, 1.3),
    "mouth_open": (-0.8, 0.0, 2.2),  # (+)
    "gaze_u": (0.0, 0.0, 1.3),
    "gaze_v": (0.0, 0.0, 0.5),
    # pose
    "yaw": (0.0, 0.0, 0.30),
    "pitch": (0.0, 0.0, 0.17),
    # light
    "light_x": (0.0, 0.0, 0.8),
    "light_y": (-0.4, 0.0, 0.5),
    "ambient": (0.55, 0.0, 0.12),
    "warmth": (0.0, 0.0, 0.10),
    "tint": (0.0, 0.0, 0.05),
    # occlusion
    "glasses": (-0.9, 0.4, 1.0),  # (+)
    "sunglasses": (-1.9, 0.0, 1.0),  # (+)
    "mask": (-1.9, 0.0, 1.0),  # (+)
    "bar": (-1.5, 0.0, 1.0),  # (+)
    "hat": (-1.6, 0.0, 1.0),  # (+)
    # camera
    "exposure": (1.05, 0.0, 0.16),
    "contrast": (1.0, 0.0, 0.14),
    "tone": (0.1, 0.0, 0.3),
    "gray": (-1.0, 0.0, 1.0),  # (+)
    "blur": (0.12, 0.0, 0.10),  # (+)
    "noise": (0.015, 0.0, 0.012),  # (+)
}
_SPREADS = np.array(list(PARAMETERS.values())).T
_NUM_MOLES = 4
_LANDMARK_ERROR = 1.0  # px, standard deviation
_TEMPLATE = ARCFACE_POINTS[:, 0] + 1j * ARCFACE_POINTS[:, 1]  # x + iy
_CHIN = 42.0  # px below the template's centroid


def _color(*rgb: float) -> Color:
    return np.array(rgb, np.float32)[:, None, None]


def _soft(distance: Plane) -> Plane:
    """Coverage in [0, 1] at a signed distance (px, negative inside) from an edge."""
    return np.minimum(np.maximum(0.5 - distance, 0), 1)


def _ellipse(x: Plane, y: Plane, a: float, b: float) -> Plane:
    """Signed distance (px) from the ellipse with half-axes a, b, exact along the shorter one."""
    return min(a, b) * np.sqrt((x / a) ** 2 + (y / b) ** 2) - min(a, b)


@lru_cache(maxsize=4)
def _pixel_centers(size: int) -> NDArray[np.float32]:
    """Centres of ``size`` pixels in the coordinates of the 112-pixel template."""
    return ((np.arange(size) + 0.5) * (112 / size) - 0.5).astype(np.float32)


class _Head:
    """A picture being painted, and where each of its pixels lies on the turned head.

    Attributes:
        hair_color, skin_color: what the face's numbers make of them.
        image: (3, size, size) float32, RGB in [0, 1], the colors before light falls on them.
        shade: plane, how bright the relief of the face makes its light.
        x, y: planes, px; the pixel's place in front of the camera, in the head's own scale.
        u, v: planes, px; the pixel's place on the head.
        normal: three planes, the unit sphere's normal at the pixel, towards the camera.
        radius: plane, distance from the head's center as a part of its radius there.
        skin: plane, coverage of the pixel by the head.
    """

    def __init__(self, face: SimpleNamespace, landmark_error: NDArray[np.complex128], size: int):
        self.face, self.size, self.center = face, size, _CHIN - face.head_length
        self.sin_yaw, self.cos_yaw = math.sin(face.yaw), math.cos(face.yaw)
        self.sin_pitch, self.cos_pitch = math.sin(face.pitch), math.cos(face.pitch)
        light, dark = max(face.hair_light, 0.03), min(max(face.skin_dark, 0.0), 1.0)
        self.hair_color = _color(light + face.hair_warm, light, max(light - face.hair_warm, 0.0))
        pale, deep = _color(0.95, 0.78, 0.68), _color(0.42, 0.27, 0.19)
        self.skin_color = pale + dark * (deep - pale) + _color(face.skin_red, 0.0, 0.0)
        self.image = np.empty((3, size, size), np.float32)
        self.shade = np.ones((size, size), np.float32)
        self._align(landmark_error)
        self._unproject()

    def _align(self, landmark_error: NDArray[np.complex128]) -> None:
        """Least squares for template = a landmarks + b, complex a: scale and rotation."""
        face, eye = self.face, self.face.eye_distance / 2
        landmarks = landmark_error + np.array(
            [
                self.project(-eye, face.eye_height),
                self.project(eye, face.eye_height),
                self.project(0.0, face.nose_tip, face.nose_lift),
                self.project(-face.mouth_width, face.mouth_height),
                self.project(face.mouth_width, face.mouth_height),
            ]
        )
        p, q = landmarks - landmarks.mean(), _TEMPLATE - _TEMPLATE.mean()
        self.a = complex(np.vdot(p, q) / np.vdot(p, p))
        self.b = complex(_TEMPLATE.mean() - self.a * landmarks.mean())

    def _taper(self, y: Any) -> Any:
        """Half-width of the head at height y in [-1, 1] (chin) as a part of its widest."""
        below = 0.5 * (y + 0.1 + abs(y + 0.1))  # the positive part, of numbers and planes alike
        return 1 - self.face.jaw * below * below

    def project(self, u: float, v: float, lift: float = 0.0) -> complex:
        """Where the camera sees a point of the head (x + iy, px) that rises ``lift`` radii."""
        x, y = u / self.face.head_width, (v - self.center) / self.face.head_length
        z = math.sqrt(max(1 - x * x - y * y, 0.0)) + lift
        x, z = self.cos_yaw * x + self.sin_yaw * z, self.cos_yaw * z - self.sin_yaw * x
        y = self.cos_pitch * y + self.sin_pitch * z
        width = self.face.head_width * self._taper(y)
        return complex(x * width, self.center + y * self.face.head_length)

    def _unproject(self) -> None:
        """Fill the planes: the inverse of ``project`` for every pixel."""
        face, inverse, shift = self.face, 1 / self.a, -self.b / self.a
        across, down = _pixel_centers(self.size), _pixel_centers(self.size)[:, None]
        self.x = across * inverse.real + (shift.real - down * inverse.imag)
        self.y = across * inverse.imag + (shift.imag + down * inverse.real)
        y = (self.y - self.center) / face.head_length
        x = self.x / (face.head_width * self._taper(y))
        self.radius = np.sqrt(x * x + y * y)
        self.skin = _soft((self.radius - 1) * face.head_width)
        z = np.sqrt(np.maximum(1 - self.radius**2, 0))
        self.normal = (x, y, z)
        y, z = self.cos_pitch * y - self.sin_pitch * z, self.cos_pitch * z + self.sin_pitch * y
        x = self.cos_yaw * x - self.sin_yaw * z
        self.u, self.v = x * face.head_width, y * face.head_length + self.center

    def near(self, u: float, v: float, reach_u: float, reach_v: float) -> tuple[Plane, Plane, Any]:
        """Offsets (px) from a point of the head, in the window within reach of it."""
        scale = self.size / 112
        pixel, reach = (self.a * self.project(u, v) + self.b) * scale, abs(self.a) * scale
        (top, bottom), (left, right) = (
            (max(int(middle - half), 0), max(int(middle + half) + 1, 0))
            for middle, half in ((pixel.imag, reach * reach_v), (pixel.real, reach * reach_u))
        )
        window = (slice(top, bottom), slice(left, right))
        return self.u[window] - u, self.v[window] - v, window

    def paint(self, coverage: Plane, color: Color | float, window: Any = ()) -> None:
        """Lay a color over the window, or over the whole picture."""
        target = self.image[(slice(None), *window)]
        target += coverage * (color - target)

    def relief(self, u: float, v: float, a: float, b: float, amount: float) -> None:
        """Brighten (amount > 0) or darken a smooth spot with half-axes a, b px."""
        x, y, window = self.near(u, v, 2 * a, 2 * b)
        self.shade[window] *= 1 + amount * np.exp((-1 / a**2) * x * x - (1 / b**2) * y * y)


def _paint_behind(head: _Head, rng: np.random.Generator) -> None:
    """A mosaic of rectangles for walls and furniture, then clothes, hair and ears."""
    face, size, x, y = head.face, head.size, head.x, head.y
    mosaic = 0.4 * rng.random((3, 4, 4), np.float32) + 0.6 * rng.random((1, 4, 4), np.float32)
    edges = np.sort(rng.integers(0, size, (2, 3)), axis=1)
    heights, widths = np.diff(edges, prepend=0, append=size)
    head.image[...] = mosaic.repeat(heights, axis=1).repeat(widths, axis=2)
    head.paint(_soft(35 + 0.3 * np.abs(x) - y), rng.random((3, 1, 1), np.float32))
    volume = max(face.hair_volume, 0.5)
    width, length = face.head_width + volume, face.head_length + volume
    hair = _ellipse(x, y - head.center, width, length)
    if face.long_hair > 0:
        hair = np.minimum(hair, np.maximum(np.abs(x) - width, head.center - y))
    else:
        hair = np.maximum(hair, y - 0.5 * head.center)
    head.paint(_soft(hair), head.hair_color * 0.85)
    for side in (-1, 1):
        if side * head.sin_yaw < 0.15:  # the head hides the ear on the side it turns to
            from_ear = x - side * (face.head_width - 0.5), y - face.eye_height - 8
            ear = _ellipse(*from_ear, 0.5 * face.ear_size, 1.2 * face.ear_size)
            head.paint(_soft(ear), head.skin_color * 0.8)


def _paint_skin(head: _Head, moles: NDArray[np.float64]) -> None:
    """Skin, moles, beard and the hair above the forehead."""
    face, skin, hair = head.face, head.skin_color, head.hair_color
    head.paint(head.skin, skin)
    for u, v in moles.tolist():
        x, y, window = head.near(u, v, 2, 2)
        head.paint(_soft(_ellipse(x, y, 1.0, 1.0)) * max(face.moles, 0.0), skin * 0.35, window)
    if face.beard > 0:
        x, y, window = head.near(0, face.mouth_height, 70, 40)
        below = _soft(-0.2 * (y + 7 + 0.012 * x * x)) * head.skin[window]
        head.paint(below * min(face.beard, 0.75), hair, window)
    part = (head.u - face.hairline_part) / face.head_width
    scalp = _soft((head.radius - 1.02) * face.head_width)
    line = face.hairline + face.hairline_bow * part * part
    head.paint(_soft(0.5 * (head.v - line)) * scalp, hair)


def _paint_eyes(head: _Head) -> None:
    face, skin, hair = head.face, head.skin_color, head.hair_color
    blue = min(max(face.iris_blue, 0.0), 1.0)
    iris = _color(0.45 - 0.2 * blue, 0.28 + 0.2 * blue, 0.12 + 0.5 * blue)
    iris *= 0.5 + face.iris_light
    opening = max(face.eye_opening, 0.15)
    for side in (-1, 1):
        center = side * face.eye_distance / 2
        head.relief(center, face.eye_height - 2, 13, 8, -face.socket)
        x, y, window = head.near(center, face.eye_height, 11, 9)
        y = y - face.eye_tilt * side * x
        arc = 1 - (x / face.eye_width) ** 2
        upper = y + opening * arc
        inside = _soft((np.abs(y) - opening * arc) * 0.8)
        ball = np.sqrt((x - face.gaze_u) ** 2 + (y - face.gaze_v) ** 2)
        head.paint(inside, _color(0.88, 0.86, 0.84), window)
        head.paint(inside * _soft(ball - face.iris_radius), iris, window)
        head.paint(inside * _soft(ball - 1.3), 0.05, window)
        head.paint(0.8 * _soft((np.abs(upper) - 0.5) * 0.9) * (arc > 0), 0.12, window)
        crease = _soft(np.abs(upper + 2.4) - 0.4) * (arc > -0.1)
        head.paint(max(face.lid, 0.0) * crease, skin * 0.55, window)

        x, y, window = head.near(center + 0.5 * side, face.eye_height - face.brow_gap, 13, 8)
        outward = side * x / face.brow_width
        middle = face.brow_arch * (outward**2 - 0.5) + face.brow_tilt * side * x
        thickness = face.brow_thickness * (1 - 0.45 * outward)
        edge = np.maximum(np.abs(y - middle) - thickness, np.abs(x) - face.brow_width)
        head.paint(face.brow_density * _soft(0.7 * edge), hair * 0.75, window)


def _paint_nose(head: _Head) -> None:
    """A lit ridge from between the eyes to the tip, which the pose moves (parallax)."""
    face, skin = head.face, head.skin_color
    tip_u = face.head_width * face.nose_lift * head.sin_yaw
    tip_v = face.nose_tip + face.head_length * face.nose_lift * head.sin_pitch
    length = tip_v - face.eye_height
    x, y, window = head.near(tip_u / 2, face.eye_height + length / 2, 20, length / 2 + 3)
    t = np.clip(y / length + 0.5, 0, 1)  # 0 between the eyes, 1 at the tip
    x += tip_u * (0.5 - t) - face.nose_bend * np.sin(np.pi * t)
    x /= face.nose_ridge * (0.9 + 0.6 * t)
    flank = np.exp(-0.2 * x * x)
    ridge = 0.30 * np.exp(-x * x) - 0.18 * flank + 0.10 * face.light_x * x * flank
    head.shade[window] *= 1 + np.minimum(4 * t * (1.1 - t), 1) * ridge
    head.relief(tip_u, tip_v - 1, 4, 3.5, 0.18)
    head.relief(tip_u, tip_v + 6, face.nose_width, 2.2, -0.25)
    for side in (-1, 1):
        x, y, window = head.near(tip_u + side * 0.5 * face.nose_width, tip_v + 3.6, 3, 3)
        nostril = _soft(0.8 * _ellipse(x, y, 0.27 * face.nose_width, 1.3))
        head.paint(0.75 * nostril, skin * 0.25, window)
        x, y, window = head.near(tip_u + side * face.nose_width, tip_v + 1.5, 3, 5)
        wing = _soft(np.abs(_ellipse(x, y, 1.6, 3.2)) - 0.3) * (side * x > 0)
        head.paint(0.45 * wing, skin * 0.45, window)


def _paint_mouth(head: _Head) -> None:
    """Lips, the open mouth with its teeth, and what a smile does to the cheeks."""
    face, skin = head.face, head.skin_color
    lips = skin * (1 - face.lip_red * _color(0.25, 0.75, 0.65))
    smile, gap = max(face.smile, 0.0), max(face.mouth_open, 0.0)
    width = face.mouth_width + 0.9 * smile
    x, y, window = head.near(0, face.mouth_height, 24, 18)
    y += face.smile * ((x / width) ** 2 - 0.5)
    arc = np.maximum(1 - (x / width) ** 2, 0)
    bow = face.upper_lip * arc * (1 - 0.35 * np.exp(-((x / 3) ** 2)))
    below = y - gap * arc
    within = arc > 0
    lip = _soft(np.maximum(-y - bow, below - face.lower_lip * arc)) * within
    head.paint(0.9 * lip, lips, window)
    head.paint(_soft(np.maximum(-y, below)) * within, _color(0.25, 0.08, 0.08), window)
    if gap > 1.5:
        teeth = _soft(np.maximum(-y, y - 0.5 * gap * arc)) * (arc > 0.15)
        head.paint(teeth, _color(0.9, 0.88, 0.84), window)
    head.paint(0.7 * _soft(np.abs(y) - 0.25) * within, skin * 0.3, window)
    head.relief(0, face.mouth_height + gap + face.lower_lip + 4.5, 9, 3, -face.chin_fold)
    for side in (-1, 1):
        head.relief(side * (width + 4), face.mouth_height - 8, 2.5, 8, -0.07 * smile)
        head.relief(side * 24, -2, 9, 8, face.cheek)


def _light(head: _Head, rng: np.random.Generator) -> None:
    """Lambert's law under one lamp and a sky, relief, and the edge of a cast shadow."""
    face = head.face
    angle, offset, depth = rng.uniform((0, -30, -0.5), (2 * math.pi, 30, 0.5)).tolist()
    lamp_z = 1 / math.sqrt(1 + face.light_x**2 + face.light_y**2)
    x, y, z = head.normal
    lambert = np.maximum(face.light_x * lamp_z * x + face.light_y * lamp_z * y + lamp_z * z, 0)
    shade = head.shade * (1 + head.skin * ((1 - face.ambient) * (1.25 * lambert - 1)))
    edge = math.cos(angle) * head.x + math.sin(angle) * head.y - offset
    shade *= 1 - max(depth, 0.0) * _soft(-0.15 * edge)
    head.image *= shade
    head.image *= _color(1 + face.warmth, 1 + face.tint, 1 - face.warmth)


def _occlude(head: _Head, rng: np.random.Generator) -> None:
    """Glasses, mask, hat, and a bar across the picture."""
    face, color = head.face, rng.random((3, 1, 1), np.float32)
    if face.glasses > 0 or face.sunglasses > 0:
        size = rng.uniform(11, 13)
        for side in (-1, 1):
            x, y, window = head.near(side * face.eye_distance / 2, face.eye_height + 1, 15, 12)
            lens = ((np.abs(x) / size) ** 3 + (np.abs(y) / (0.8 * size)) ** 3) ** (1 / 3)
            if face.sunglasses > 0:
                head.paint(0.9 * _soft((lens - 1) * size), color * 0.2, window)
            head.paint(0.9 * _soft(np.abs(lens - 1) * size - 0.7), color * 0.5, window)
        x, y, window = head.near(0, face.eye_height, 8, 3)
        bridge = np.maximum(np.abs(y) - 0.8, np.abs(x) - 6.5)
        head.paint(0.9 * _soft(bridge), color * 0.5, window)
    if face.mask > 0:
        head.paint(_soft(4 - head.v - 0.004 * head.u**2) * head.skin, 0.3 + 0.6 * color)
    if face.hat > 0:
        head.paint(_soft(head.v - face.hairline - 6) * (head.radius < 1.2), color)
    if face.bar > 0:
        angle, offset, half_width = rng.uniform((0, -40, 4), (math.pi, 40, 12)).tolist()
        across = math.cos(angle) * head.x + math.sin(angle) * head.y - offset
        head.paint(_soft(np.abs(across) - half_width), color)


def _photograph(head: _Head, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Exposure, contrast, tone, loss of color, blur and noise; rounded to bytes."""
    face, image = head.face, head.image
    image *= face.exposure * face.contrast
    image += 0.5 * (1 - face.contrast)
    image += face.tone * image * (1 - image)
    if face.gray > 0:
        image += min(face.gray, 1.0) * (image.mean(axis=0) - image)
    if face.blur > 0:
        for _ in range(2):  # steps of diffusion along each axis
            image[:, 1:-1] += face.blur * np.diff(image, 2, axis=1)
            image[:, :, 1:-1] += face.blur * np.diff(image, 2, axis=2)
    image *= 255
    # Uniform bytes are quicker than a Gaussian; their standard deviation is 256 / sqrt(12).
    noise = rng.integers(0, 256, image.shape, np.uint8) - np.float32(127.5)
    image += max(face.noise, 0.0) * math.sqrt(12) * noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def draw_face(seed: int, identity: int, image: int, size: int = 112) -> NDArray[np.uint8]:
    """Draw one aligned photograph of one invented person, a pure function of its arguments.

    Args:
        seed: names the population, in [0, 2**32).
        identity: names the person, in [0, 2**32).
        image: names the photograph, in [0, 2**32 - 1).
        size: side of the square picture, pixels.

    Returns:
        (3, size, size) uint8, RGB in [0, 255].
    """
    # SeedSequence cannot tell [a, b] from [a, b, 0], so photographs count from one.
    person = np.random.default_rng([seed, identity])
    rng = np.random.default_rng([seed, identity, image + 1])
    mean, between, within = _SPREADS
    z = np.clip([person.standard_normal(mean.size), rng.standard_normal(mean.size)], -2, 2)
    values = mean + between * z[0] + within * z[1]
    face = SimpleNamespace(**dict(zip(PARAMETERS, values.tolist(), strict=True)))
    error = rng.normal(0, _LANDMARK_ERROR, (2, _TEMPLATE.size))
    head = _Head(face, error[0] + 1j * error[1], size)
    _paint_behind(head, rng)
    _paint_skin(head, person.uniform((-30, -40), (30, 34), (_NUM_MOLES, 2)))
    _paint_eyes(head)
    _paint_nose(head)
    _paint_mouth(head)
    _light(head, rng)
    _occlude(head, rng)
    return _photograph(head, rng)
