"""
Writes the prompts of `recipes/smollm2-135m-two-domains.yaml`, the same files on every run:

    python recipes/data/make_smollm2_data.py

`qa` asks for the capitals of countries. A country belongs to one split only, with all of its phrasings. `writing` asks
for a sentence that contains two given words. A pair of words belongs to one split only; the single words do not.
"""

import argparse
import hashlib
import json
from itertools import combinations
from pathlib import Path


SPLITS = ("train", "selection", "test")

# Members of the United Nations with the names and spellings that are usual in English, without accents.
# Left out, because a right answer could not be told from a wrong one:
# - several capitals, none, a disputed one or one on the move: Bolivia, Equatorial Guinea, Eswatini, Indonesia, Israel,
#   Nauru, South Africa, Sri Lanka, Yemen;
# - several names or spellings in use: Antigua and Barbuda, Grenada, Kazakhstan, Kiribati, Mongolia, Myanmar, Palau,
#   Tonga, Ukraine;
# - the capital's name stands in the country's, so that repeating the question would do: Djibouti, Guinea-Bissau,
#   Luxembourg, Monaco, San Marino, Sao Tome and Principe, Singapore.
CAPITALS = """
Afghanistan: Kabul | Albania: Tirana | Algeria: Algiers | Andorra: Andorra la Vella | Angola: Luanda
Argentina: Buenos Aires | Armenia: Yerevan | Australia: Canberra | Austria: Vienna | Azerbaijan: Baku
the Bahamas: Nassau | Bahrain: Manama | Bangladesh: Dhaka | Barbados: Bridgetown | Belarus: Minsk
Belgium: Brussels | Belize: Belmopan | Benin: Porto-Novo | Bhutan: Thimphu | Bosnia and Herzegovina: Sarajevo
Botswana: Gaborone | Brazil: Brasilia | Brunei: Bandar Seri Begawan | Bulgaria: Sofia
Burkina Faso: Ouagadougou | Burundi: Gitega | Cambodia: Phnom Penh | Cameroon: Yaounde | Canada: Ottawa
Cape Verde: Praia | the Central African Republic: Bangui | Chad: N'Djamena | Chile: Santiago | China: Beijing
Colombia: Bogota | the Comoros: Moroni | Costa Rica: San Jose | Croatia: Zagreb | Cuba: Havana
Cyprus: Nicosia | the Czech Republic: Prague | the Democratic Republic of the Congo: Kinshasa
Denmark: Copenhagen | Dominica: Roseau | the Dominican Republic: Santo Domingo | East Timor: Dili
Ecuador: Quito | Egypt: Cairo | El Salvador: San Salvador | Eritrea: Asmara | Estonia: Tallinn
Ethiopia: Addis Ababa | Fiji: Suva | Finland: Helsinki | France: Paris | Gabon: Libreville
the Gambia: Banjul | Georgia: Tbilisi | Germany: Berlin | Ghana: Accra | Greece: Athens
Guatemala: Guatemala City | Guinea: Conakry | Guyana: Georgetown | Haiti: Port-au-Prince
Honduras: Tegucigalpa | Hungary: Budapest | Iceland: Reykjavik | India: New Delhi | Iran: Tehran
Iraq: Baghdad | Ireland: Dublin | Italy: Rome | Ivory Coast: Yamoussoukro | Jamaica: Kingston | Japan: Tokyo
Jordan: Amman | Kenya: Nairobi | Kuwait: Kuwait City | Kyrgyzstan: Bishkek | Laos: Vientiane | Latvia: Riga
Lebanon: Beirut | Lesotho: Maseru | Liberia: Monrovia | Libya: Tripoli | Liechtenstein: Vaduz
Lithuania: Vilnius | Madagascar: Antananarivo | Malawi: Lilongwe | Malaysia: Kuala Lumpur | the Maldives: Male
Mali: Bamako | Malta: Valletta | the Marshall Islands: Majuro | Mauritania: Nouakchott | Mauritius: Port Louis
Mexico: Mexico City | Micronesia: Palikir | Moldova: Chisinau | Montenegro: Podgorica | Morocco: Rabat
Mozambique: Maputo | Namibia: Windhoek | Nepal: Kathmandu | the Netherlands: Amsterdam
New Zealand: Wellington | Nicaragua: Managua | Niger: Niamey | Nigeria: Abuja | North Korea: Pyongyang
North Macedonia: Skopje | Norway: Oslo | Oman: Muscat | Pakistan: Islamabad | Panama: Panama City
Papua New Guinea: Port Moresby | Paraguay: Asuncion | Peru: Lima | the Philippines: Manila | Poland: Warsaw
Portugal: Lisbon | Qatar: Doha | the Republic of the Congo: Brazzaville | Romania: Bucharest | Russia: Moscow
Rwanda: Kigali | Saint Kitts and Nevis: Basseterre | Saint Lucia: Castries
Saint Vincent and the Grenadines: Kingstown | Samoa: Apia | Saudi Arabia: Riyadh | Senegal: Dakar
Serbia: Belgrade | Seychelles: Victoria | Sierra Leone: Freetown | Slovakia: Bratislava | Slovenia: Ljubljana
the Solomon Islands: Honiara | Somalia: Mogadishu | South Korea: Seoul | South Sudan: Juba | Spain: Madrid
Sudan: Khartoum | Suriname: Paramaribo | Sweden: Stockholm | Switzerland: Bern | Syria: Damascus
Tajikistan: Dushanbe | Tanzania: Dodoma | Thailand: Bangkok | Togo: Lome | Trinidad and Tobago: Port of Spain
Tunisia: Tunis | Turkey: Ankara | Turkmenistan: Ashgabat | Tuvalu: Funafuti | Uganda: Kampala
the United Arab Emirates: Abu Dhabi | the United Kingdom: London | the United States: Washington
Uruguay: Montevideo | Uzbekistan: Tashkent | Vanuatu: Port Vila | Venezuela: Caracas | Vietnam: Hanoi
Zambia: Lusaka | Zimbabwe: Harare
"""
PHRASINGS = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital city of {country}.",
)
# Shares of the countries that go to selection and test; the others go to train.
QA_SHARES = {"selection": 0.2, "test": 0.2}

WORDS = """
apple ball basket bear bed bell bird boat book bottle bread bridge brother bucket butter cake camera candle
castle cat chair cheese child city clock cloud coat coffee cold corn cow cup dance desert doctor dog door
dream drum egg engine farmer feather field fire fish flag flower forest fox friend garden gift glass gold
grass guitar hammer happy hat hill honey horse house ice island jacket key king kitchen kite ladder lake lamp
leaf letter lion map market milk mirror money moon mountain mouse music nest night ocean orange paper piano
picture pocket queen rabbit rain ring river road rope salt sand school ship shoe silver sister snow song spoon
star stone storm street sugar summer sun table teacher tent tiger tower train tree village wall water wind
window winter wolf
"""
WRITING_ROWS = {"train": 256, "selection": 64, "test": 96}


def shuffled(items: list, key: str) -> list:
    """
    Items in an order that depends on nothing but their text and a key, neither on a seed nor on the version of Python.

    Args:
        items (`list`):
            Items.
        key (`str`):
            Another key gives another order.

    Returns:
        `list`: The items, reordered.
    """
    return sorted(items, key=lambda item: hashlib.sha256(f"{key}/{item}".encode()).digest())


def qa_rows() -> dict[str, list[dict]]:
    """
    Questions about capitals.

    Returns:
        `dict[str, list[dict]]`: For each split rows of `question`, `answer` and `country`.
    """
    entries = [entry.strip() for entry in CAPITALS.strip().replace("\n", " | ").split("|")]
    countries = shuffled([tuple(entry.split(": ")) for entry in entries], "country")
    selection, test = (round(QA_SHARES[split] * len(countries)) for split in ("selection", "test"))
    parts = {
        "selection": countries[:selection],
        "test": countries[selection : selection + test],
        "train": countries[selection + test :],
    }
    return {
        split: [
            {"question": phrasing.format(country=country), "answer": capital, "country": country}
            for phrasing, country, capital in shuffled(
                [(phrasing, *pair) for pair in parts[split] for phrasing in PHRASINGS], "question"
            )
        ]
        for split in SPLITS
    }


def writing_rows() -> dict[str, list[dict]]:
    """
    Requests for a sentence with two words.

    Returns:
        `dict[str, list[dict]]`: For each split rows of `question` and `words` (separated by a space).
    """
    pairs = shuffled(list(combinations(sorted(WORDS.split()), 2)), "pair")
    rows, start = {}, 0
    for split in SPLITS:
        stop = start + WRITING_ROWS[split]
        rows[split] = [
            {
                "question": f"Write one sentence that contains the words {first} and {second}.",
                "words": f"{first} {second}",
            }
            for first, second in (shuffled(list(pair), "position") for pair in pairs[start:stop])
        ]
        start = stop
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the prompts of smollm2-135m-two-domains.yaml.")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(__file__).parent / "smollm2",
        help="folder of the JSONL files (default: smollm2, beside this script)",
    )
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for domain, rows in (("qa", qa_rows()), ("writing", writing_rows())):
        for split in SPLITS:
            path = folder / f"{domain}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
            print(f"{path.name}: {len(rows[split])} rows")


if __name__ == "__main__":
    main()
