"""How much CO2 a kilowatt hour of electricity stands for, by country.

Grams of CO2-equivalent per kWh generated in 2023, over the life cycle of the plants: Ember and Energy Institute, processed by Our World in Data
(ourworldindata.org/grapher/carbon-intensity-electricity), read on 2026-11-22 from the copy in codecarbon 3.3.2; the world's mean for 2023: Ember 2024.
A year's mean of a whole country: the hour, the grid zone and a supplier's contract can each change it by more than half, so give your own number where you know
it.
"""

SOURCE = "Ember 2023"
INTENSITY = {
    "world": 481, "ARG": 354, "AUS": 549, "AUT": 111, "BEL": 138, "BRA": 98, "CAN": 170, "CHE": 35, "CHL": 291, "CHN": 582, "CZE": 450, "DEU": 381, "DNK": 152,
    "EGY": 570, "ESP": 174, "EST": 417, "FIN": 79, "FRA": 56, "GBR": 238, "IND": 713, "IRL": 291, "ITA": 331, "JPN": 485, "KEN": 70, "KOR": 431, "MEX": 507,
    "NGA": 523, "NLD": 268, "NOR": 30, "NZL": 113, "POL": 662, "PRT": 166, "SGP": 471, "SWE": 41, "TUR": 465, "TWN": 642, "USA": 369, "VNM": 475, "ZAF": 708}


def intensity(region: str) -> tuple[float, str]:
    """Grams of CO2 per kWh of a region, and where the figure comes from.

    Args:
      region: "world", an ISO 3166 code of three letters, or a number of grams per kWh as text.

    Raises:
      ValueError: one line: not known.
    """
    if region.upper() in INTENSITY or region == "world":
        name = region if region == "world" else region.upper()
        return float(INTENSITY[name]), f"{'world mean' if name == 'world' else name}, {SOURCE}"
    try:
        grams = float(region)
    except ValueError:
        grams = -1.0
    if not 0 <= grams < 5000:
        raise ValueError(f"energy.region={region!r} is not known: give a number of grams of CO2 per kWh, or one of {', '.join(INTENSITY)}")
    return grams, "energy.region"
