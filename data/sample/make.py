"""Write the example data of this folder: original rows in FinLoRA's row format.

Every sentence, question and definition below was written for this project; the companies,
people and figures are made up. Keys that are numbers are computed here, with Decimal.

    python data/sample/make.py           rewrite every file, byte for byte the same each time
    python data/sample/make.py --check   exit 1, naming the first file that differs
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20250
Row = dict[str, str]
Values = dict[str, str]
Numbers = dict[str, Decimal]

SENTIMENT_LABELS = ("negative", "neutral", "positive")
NWGI_LABELS = (
    "strong negative",
    "moderately negative",
    "mildly negative",
    "neutral",
    "mildly positive",
    "moderately positive",
    "strong positive",
)
ENTITY_LABELS = ("person", "location", "organization")


def items(block: str) -> list[str]:
    """Split a text block into its items: "- " begins one, other lines go on with it."""
    texts: list[str] = []
    for line in block.strip().splitlines():
        text = line.strip()
        if text.startswith("- "):
            texts.append(text[2:])
        elif text:
            texts[-1] += " " + text
    return texts


def fields(block: str) -> list[tuple[str, ...]]:
    """Split each item of a block at " | "."""
    return [tuple(part.strip() for part in item.split(" | ")) for item in items(block)]


def names(block: str) -> list[str]:
    """Split a comma-separated list over several lines."""
    return [name.strip() for name in block.replace("\n", " ").split(",") if name.strip()]


# ---------------------------------------------------------------- names and things

TRAIN_COMPANIES = names("""
Halvoria, Brennick Group, Tessalin, Norvelta, Quillmark, Draymoor, Oskaro,
Pellgrave, Kestavar, Lumidale, Varnholt, Ostrelia, Fennimar, Corvaldi, Hartwend,
Sorrelbank, Ruskovia, Telmarin, Ivarstad Industries, Brightholm, Calderis, Mossgate Works,
Ekenvall, Torvane, Zephlin, Marrowick, Jandelta, Ulvera, Stonefjord, Wexmore
""")
TEST_COMPANIES = names("""
Aldermere, Bravonix, Castlewyn, Dornaby, Elvarinen, Farrowline, Glimmerby, Hollstrand,
Iskander Works, Junovale, Karsten Brook, Lindarosa, Myrefield, Nestorin, Oppenvik, Prallon,
Rimswell, Sandoria, Tornhill Group, Umbrafel, Vestergrove, Yarnwick
""")
CITIES = names("""
Oulu, Tampere, Gdansk, Porto, Leeds, Malmo, Riga, Antwerp, Graz, Bilbao, Cork, Ostrava, Houston,
Pune, Tallinn, Bremen
""")
PRODUCTS = names("""
paper machines, elevator components, wind turbine blades, payment terminals, insulin pens,
frozen vegetables, tractor tyres, hotel beds, marine engines, packaging films,
solar inverters, forest harvesters, steel tubes, base station antennas, baby carriages,
running shoes, dental implants, harbour cranes, optical cables, water pumps
""")
PEOPLE = names("""
Mira Castellan, Jonas Wetterby, Priya Ramanelli, Oskar Lindqvale, Helena Strovik, Tomas Brandeel,
Amara Okonjide, Peter Hallowick, Sofia Marchetto, Daniel Ferncastle, Ingrid Solvane,
Marcus Twillfield, Yuki Tanabori, Laura Pennwright, Rafael Dominguera, Katja Virtamaki
""")
ROLES = names("""
chief financial officer, head of investor relations, chief operating officer, general counsel,
senior vice president for sales, head of treasury
""")
BROKERS = names("Larkmoor Securities, Pinebridge Lane Research, Octavian Cole, Harbourgate Capital")
QUARTERS = ("first quarter", "second quarter", "third quarter", "fourth quarter")
MONTHS = names("""
January, February, March, April, May, June, July, August, September, October, November, December
""")

# ---------------------------------------------------------------- sentiment

TRAIN_SENTIMENT = {
    "neutral": """
- {co} will publish its {q} {y} interim report on {m} {day} at 8 a.m.
- The annual general meeting of {co} will be held in {city} on {m} {day} , {y} .
- {co} is located in {city} and employs about {n} people.
- {co} makes {prod} and {prod2} at its plant in {city}.
- The head office of {co} will move from {city} to {city2} in {m} {y}.
- {co} has appointed {p} as {role} from {m} {day}.
- {p} , {role} of {co} , will give a presentation at an investor conference in {city} .
- The board of {co} consists of {few} members, and {p} continues as its chair.
- {co}, founded in 19{tt}, supplies {prod} to customers in {few} countries.
- Net sales of {co} amounted to {amt} in {y}.
- The {city} unit of {co} has an annual capacity of {kilo} tonnes.
- {co} said the value of the transaction was not disclosed.
- {co} holds {share} of the shares and votes in {co2}.
- The share capital of {co} totals {amt} and is divided into {sh} shares.
- The financial statements of {co} have been prepared in accordance with IFRS.
- {co} divides its business into {few} segments, of which {prod} is one.
- {sh} shares of {co} changed hands during the session in {city}.
- According to {co}, the contract with the city of {city} covers the years {y} to {y2}.
- The new shares of {co} were entered in the trade register on {m} {day}.
- {co} has changed the name of its subsidiary in {city} to {co} Services.
- The interim report of {co} is available in English on the website of the company.
- {co} will change its ticker symbol on the exchange on {m} {day}.
- The {prod} unit of {co} is headed by {p}, who reports to the chief executive.
- The deal between {co} and {co2} concerns {prod} only and excludes the site in {city}.
- {co} and {co2} each own half of the joint venture in {city}.
- Trading in the shares of {co} begins on the main list in {m} {y}.
- {co} received a notice under which {p} now holds {sh} shares.
- The nomination committee proposes that {p} and {p2} be elected to the board of {co}.
- The auditor of {co} is {co2} Audit, with {p} as the auditor in charge.
- The record date for the dividend of {co} is {m} {day}.
- {co} sells its {prod} through distributors in {city} and {city2}.
- The financial year of {co} begins on the first day of {m}, and its quarters follow from that.
- The warehouse of {co} in {city} has a floor area of {kilo} square metres.
- {co} rents its offices in {city} under a lease that runs until {y2}.
- A conference call for analysts will be hosted by {p} of {co} at 3 p.m. on {m} {day}.
- The subscription period for the stock options of {co} begins on {m} {day}, {y}.
- The report lists {co}, {co2} and other makers of {prod} by country.
- {co} develops, makes and markets {prod} for wholesale customers.
- The ground floor of the building owned by {co} in {city} will be used as a showroom.
- Other details of the agreement between {co} and {co2} were not given.
- {co} had {n} employees at the end of {m} {y}, about as many as at the end of {y0}.
- {p} has worked for {co} since {y0} and lives in {city}.
""",
    "positive": """
- Operating profit of {co} rose to {hi} from {lo} a year earlier.
- {co} said its net sales increased by {up} to {hi} in the {q}.
- Net profit more than doubled at {co}, helped by strong demand for {prod}.
- {co} swung to a profit of {lo} in the {q}, against a loss of {hi} a year ago.
- {co} has signed a contract worth {big} to deliver {prod} to a customer in {city}.
- {co} won an order for {prod} from {co2}, the largest in its history.
- {co} raised its guidance for {y} after order intake grew by {pct}.
- The board of {co} proposes to raise the dividend to {ehi} per share from {elo}.
- {co} beat forecasts in the {q} as margins improved in {prod}.
- Earnings per share of {co} grew to {ehi} in {y} from {elo} in {y0}.
- The order book of {co} strengthened by {up} and stood at {hi} at the end of {m}.
- {co} will open a second factory in {city} to meet growing demand for {prod}, hiring {n} people.
- {broker} upgraded {co} to buy and lifted its price target.
- Shares in {co} jumped by {pct} after it reported record sales of {prod}.
- {co} expects its full-year result to improve clearly on {y0}.
- The pretax profit of {co} climbed {up} to {hi} thanks to lower costs.
- The acquisition of {co2} will add {amt} to the yearly profit of {co}, the company said.
- {co} gained market share in {city}, and its sales of {prod} were up by {pct}.
- The authorities approved the new {prod} of {co}, so that sales can start in {m} as hoped.
- {co} won the patent case against {co2} and will receive {amt} in damages.
""",
    "negative": """
- Operating profit of {co} fell to {lo} from {hi} a year earlier.
- {co} said its net sales decreased by {dn} to {lo} in the {q}.
- The loss of {co} widened to {hi} in the {q} from {lo} a year ago.
- {co} cut its guidance for {y}, citing weak demand for {prod}.
- {co} will lay off {n} people in {city} because orders for {prod} have dropped.
- The board of {co} proposes that no dividend be paid for {y} after a loss-making year.
- {broker} downgraded {co} to sell and lowered its price target.
- Shares in {co} slumped by {pct} after it issued a profit warning.
- A court in {city} ordered {co} to pay {amt} in damages over {prod} of poor quality.
- {co} posted a loss of {lo} for {y}, compared with a profit of {hi} in {y0}.
""",
}

TEST_SENTIMENT = {
    "neutral": """
- The {q} results of {co} will be released on {day} {m} {y}, before the market opens.
- An extraordinary general meeting of {co} will be held in {city} in {m}.
- The plant is located in {city} and is one of {few} sites of {co}.
- {co}, a maker of {prod}, is based in {city} and has {n} employees.
- {p} has been named {role} at {co} and starts in {m} {y}.
- {p} continues as a member of the board of {co}, as do {p2} and the employee representative.
- {co} did not disclose the price of the deal with {co2}.
- The turnover of {co} was {amt} in its financial year {y}.
- The shares of {co} carry one vote each, and their total number is {sh}.
- {co2} owns {share} of {co} after the registration of the new shares.
- The product range of {co} includes {prod} as well as {prod2}.
- {co} will move its {prod} business to a separate legal entity on {m} {day}.
- The agreement of {co} with its bank in {city} runs until the end of {y2}.
- {co} presents its {prod} at the trade fair in {city} this {m}.
- The English version of the annual report of {co} will be published in week {few}.
- {co} operates in {few} countries, and its shares are listed in {city}.
- The premises of {co} cover {kilo} square metres on the outskirts of {city}.
- {p} , {role} , will answer questions about the report of {co} on {m} {day} .
- The dividend of {co} will be paid to holders registered on {m} {day}, as announced in {y0}.
- {co} said that {prod} will be delivered to {city} between {m} and the end of {y2}.
- {co} uses the euro as its reporting currency and publishes its figures in {m}.
- Under the option programme, employees of {co} may subscribe for {sh} shares until {y2}.
- {co} has two share classes, both of which trade in {city}.
- Before joining {co} in {y}, {p} was {role} of {co2}.
- The stock exchange release of {co} on {m} {day} concerned a change in its shareholder register.
""",
    "positive": """
- Profit at {co} rose {up} to {hi} in the {q}, up from {lo}.
- {co} reported that sales of {prod} grew in all regions and that margins improved.
- A customer in {city} has placed an order worth {big} with {co} for {prod}.
- {co} and {co2} signed a five-year supply contract valued at {big}.
- {co} lifted its outlook for {y} and now expects profit to grow by {pct}.
- {broker} raised its rating on {co} to buy, pointing to strong orders.
- {co} increased its dividend by {pct}, the tenth yearly rise in a row.
- Earnings at {co} beat expectations, and its shares climbed by {pct}.
- Demand for {prod} was stronger than planned, so {co} will hire {n} people in {city}.
- {co} turned a profit of {lo} in {y} after a loss of {hi} in {y0}.
- The backlog of {co} increased to a record {hi}, from {lo} in {m}.
- {co} won approval to sell its {prod} in new markets and expects sales to improve.
""",
    "negative": """
- Profit at {co} fell {dn} to {lo} in the {q}, down from {hi}.
- {co} issued a profit warning and cut its outlook for {y} as sales of {prod} dropped.
- {co} will close its {city} factory and lay off {n} workers after orders decreased.
- The net loss at {co} widened to {hi}, against {lo} in the same quarter of {y0}.
- {broker} lowered its rating on {co} to sell, pointing to weak demand for {prod}.
- {co} lost a lawsuit in {city} and must pay {amt}; its shares fell by {pct}.
""",
}

FIQA = {
    "positive": """
- ${tick} breaking out on heavy volume, adding to my long here
- ${tick} earnings beat, margins up, guidance raised. What is not to like?
- Bought more ${tick} after that huge {prod} order, this one goes higher
- {co} shares jump as profit tops forecasts
- {co} surges {pct} after takeover bid from {co2}
""",
    "negative": """
- ${tick} lost support at {strike}, looks weak, I am short
- ${tick} guidance cut AND a dilution? Selling everything today
- Another quarter, another miss. ${tick} keeps bleeding cash
- {co} tumbles as fraud probe at its {city} unit widens
- {co} shares sink {pct} on profit warning
""",
    "neutral": """
- ${tick} reports on {m} {day} after the close
- {co} names {p} to its board
- ${tick} annual meeting in {city} this week, agenda on the website
- {co} to move its listing from {city} to {city2} in {m}
""",
}

TFNS = {
    "positive": """
- ${tick} - {broker} upgrades {co} to outperform
- ${tick}: {co} price target raised to ${phi} from ${plo} at {broker}
- {co} stock gains {pct} premarket after Q{qn} profit beats estimates
- {co} boosts dividend by {pct} and expands buyback
- ${tick} jumps to a 52-week high after winning {big} contract
""",
    "negative": """
- ${tick} - {broker} cuts {co} to sell
- ${tick}: {co} price target lowered to ${plo} from ${phi} at {broker}
- {co} stock drops {pct} after Q{qn} revenue misses estimates
- {co} suspends dividend and withdraws full-year forecast
""",
    "neutral": """
- {co} declares regular quarterly dividend, payable {m} {day} https://example.com/{day}{qn}
- ${tick} - {co} Q{qn} {y} earnings call transcript
- {co} files its 10-K for {y} with the SEC
- ${tick} - {co} to present at industrial conference in {city} on {m} {day}
- What to know before the next board meeting of {co}
""",
}

NWGI = {
    "strong negative": """
- {co} filed for bankruptcy in {city} after lenders refused to extend {big} of loans.
- Shares of {co} collapsed by {crash} when its auditor reported years of false accounts.
""",
    "moderately negative": """
- {co} reported a {q} loss of {amt}, clearly worse than analysts had expected, and cut its outlook.
- {co} will shut one of its {city} plants after orders for {prod} fell by {mid}.
""",
    "mildly negative": """
- {co} missed {q} sales estimates by a narrow margin but kept its full-year outlook.
- Shares of {co} slipped {tiny} after a shipment of {prod} was delayed by a week.
""",
    "neutral": """
- {co} will hold its yearly investor day in {city} on {m} {day}.
- {co} named {p} as {role}; the post was vacant after a retirement.
""",
    "mildly positive": """
- {co} edged past {q} estimates, and its shares added {tiny}.
- {co} confirmed its outlook and said orders for {prod} were slightly higher than last year.
""",
    "moderately positive": """
- {co} lifted its full-year outlook after {q} profit rose by {mid}.
- {co} won a {big} contract to supply {prod} over three years, and its shares gained {pct}.
""",
    "strong positive": """
- Shares of {co} soared {crash} after {co2} agreed to buy it at a large premium.
- {co} tripled its yearly profit, doubled its dividend and raised its targets for {y2} sharply.
""",
}

# ---------------------------------------------------------------- headline

HEADLINE_QUESTIONS = {
    "price": "Does the headline talk about the price of gold?",
    "up": "Does the headline say that the price of gold goes or went up?",
    "down": "Does the headline say that the price of gold goes or went down?",
    "past": "Does the headline report a price movement that has already happened?",
    "future": "Does the headline talk about where the price of gold may go in the future?",
    "compare": "Does the headline compare gold with another asset?",
}

# headline | what is true of it | what is not true of it
TRAIN_HEADLINES = """
- Gold settles ${usd} higher at ${oz} an ounce as the dollar weakens | price, up, past | down,
  future
- Gold ends the day down ${usd} an ounce on firm bond yields | price, down, past | up, future
- Gold slides to ${oz} an ounce, its lowest close since {m} | price, down, past | up, compare
- Bullion climbs for a third session in {city} trade | price, up, past | down, compare
- Analyst sees gold at ${oz} by the end of {y2} | price, future | down, past
- Gold may drop below ${oz} next month, traders in {city} say | price, down, future | up, past
- Jeweller opens a gold workshop in {city} | - | price, up, down, future
- Mine near {city} names a new head of gold refining | - | price, up, past, compare
- Silver outperforms gold in {m} as both metals rise | up, past, compare | down, future
- Gold beats stocks for the year with a gain of {pct} | price, up, past, compare | down
- Gold futures lose {pct} in a week, worst run since {m} | price, down, past | up, future
- Gold could rise toward ${oz} if rates are cut, says bank | price, up, future | down, past
- Museum in {city} shows gold coins from the middle ages | - | price, up, future, compare
- Gold falls while oil gains in quiet trade | price, down, past, compare | up, future
"""
TEST_HEADLINES = """
- Gold adds ${usd} to finish at ${oz} an ounce | price, up, past | down, future
- Gold drops ${usd} as investors in {city} take profits | price, down, past | up, compare
- Gold seen at ${oz} within a year, survey of dealers finds | price, future | down, past
- Gold hits ${oz}, highest since {m} | price, up, past | down, future
- Precious metals: gold loses ground as platinum gains | down, past, compare | up, future
- Gold likely to slip next week as the dollar firms | price, down, future | up, past
- Refiner in {city} hires {n} people for its gold line | - | price, up, down, compare
- Gold gains {pct} in {m}, ahead of copper and shares | price, up, past, compare | down
- {city} university starts a course on the history of gold coins | - | price, past, future
"""

# ---------------------------------------------------------------- named entities

TRAIN_LOAN_SENTENCES = """
- This Loan Agreement is made between {org} , as lender , and {per} , residing in {loc} .
- Notices to {org} shall be sent to its office in {loc} , to the attention of {per} .
- IN WITNESS WHEREOF , {org} has caused this Note to be signed in {loc} by {per} , its treasurer .
- {per} shall guarantee all amounts that {org} owes to any bank in {loc} .
- The collateral held by {org} includes the warehouse in {loc} leased to {per} .
- {org} , a corporation with its seat in {loc} , is represented by {per} under this facility .
- Each advance shall be paid to the account of {per} kept with {org} in {loc} .
- If {per} leaves {org} , the borrower shall tell the agent in {loc} within ten days .
- The courts of {loc} shall settle any claim that {org} brings against {per} .
- {org} grants {per} a revolving credit for the farm near {loc} .
"""
TEST_LOAN_SENTENCES = """
- By signing below , {per} confirms that {org} may inspect the property in {loc} .
- Interest is payable monthly at the branch of {org} in {loc} , unless {per} agrees otherwise .
- {org} has assigned its rights under the term loan to {per} of {loc} .
- The borrower , {org} , keeps its books in {loc} under the care of {per} .
- A copy of this Pledge shall be left with {per} , counsel to {org} , in {loc} .
- {per} , the sole shareholder of {org} , gives a mortgage on land in {loc} .
- The closing takes place in {loc} when {org} has received the fees due from {per} .
- Prepayments by {per} to {org} do not release the security over the mill in {loc} .
"""
TRAIN_ORGS = names("""
Granite Vale Bank, Ferrowick Holdings Inc, Northmere Trust Company, Bluehaven Credit Union,
Castellan Leasing LLC, Oakridge Fields Corporation
""")
TEST_ORGS = names("""
Silverbrook Savings Bank, Palegate Industries Ltd, Redfern Hollow Capital, Mistral Bay Partners,
Copperline Mills Inc
""")
TRAIN_LOAN_PEOPLE = names("""
Edgar Whitlocke, Nadia Ferreiro, Samuel Osterby, Grace Lindenau, Victor Amberley, Paula Renfrith
""")
TEST_LOAN_PEOPLE = names("""
Bernard Castlow, Ines Vandermole, Howard Pikesley, Celia Drummore, Anton Reszkin
""")
TRAIN_PLACES = names("Denver, Ohio, Lisbon, Kent, Seattle, Nebraska, Rotterdam, Vermont")
TEST_PLACES = names("Boston, Oregon, Glasgow, Nevada, Utrecht, Tulsa, Cornwall")

# ---------------------------------------------------------------- exams
# question | right choice | wrong choices

TRAIN_EXAM = """
- Which duty does an analyst breach by passing on a client's secrets to a friend? | Confidentiality
  | Diversification | Record keeping
- A bond trades above par when its coupon rate is | higher than its yield to maturity
  | equal to its yield to maturity | lower than its yield to maturity
- Adding assets that are less than perfectly correlated to a portfolio most likely reduces its
  | unsystematic risk | systematic risk | expected number of holdings
- A rise in accounts payable, all else equal, makes the cash flow from operations | higher
  | lower | unchanged
- In a period of rising prices, FIFO instead of LIFO gives a | higher net income
  | lower net income | lower ending inventory
- The holder of a put option has the right to | sell the underlying at the strike price
  | buy the underlying at the strike price | receive dividends on the underlying
- Quoted prices in an efficient market in the semi-strong form reflect | all public information
  | past prices only | public and private information
- A central bank that wants to slow inflation most likely | raises its policy rate
  | buys government bonds | lowers reserve requirements
- The mode of a sample is its | most frequent value | middle value | average value
- Depreciation expense reduces | net income | cash paid to suppliers | the number of shares
- If demand for a good is price inelastic, a higher price leads to | higher total revenue
  | lower total revenue | unchanged total revenue
- Callable bonds give the option to redeem early to | the issuer | the bondholder | the trustee
"""
LEVEL1_EXAM = """
- An analyst who trades on a tender offer not yet announced most likely misuses
  | material nonpublic information | soft dollars | composite returns
- When market yields rise, the price of a fixed-rate bond | falls | rises | does not change
- Which measure of central tendency is least affected by outliers? | The median
  | The arithmetic mean | The midrange
- A company that capitalizes a cost instead of expensing it reports, in that year,
  | higher net income | lower total assets | lower cash flow from operations
- A call option is in the money when the price of the underlying is
  | above the strike price | below the strike price | equal to zero
- Systematic risk is measured by | beta | the standard deviation of residuals | skewness
- In perfect competition a firm is a | price taker | price setter | price leader
- Compared with common shares, preferred shares usually have a
  | prior claim on dividends | larger number of votes | later claim in liquidation
"""
LEVEL2_EXAM = """
- Under the equity method, dividends received from an associate
  | reduce the carrying amount of the investment | are shown as revenue | raise goodwill
- Heteroskedasticity means that the variance of the error term
  | changes across observations | is constant | is zero
- The price of an American call on a share without dividends, against a like European call, is
  | the same | always lower | always twice as high
- A putable bond, compared with a like bond without options, has a | higher price | lower price
  | longer effective duration
- Residual income is net income less | a charge for the cost of equity | all dividends paid
  | capital expenditure
- When functional and presentation currency differ, translation gains go to
  | other comprehensive income | revenue | retained earnings through sales
- High correlation among independent variables is called | multicollinearity
  | serial correlation | stationarity
- The value of control is most likely included in a price paid in | an acquisition of all shares
  | a small trade on the exchange | a stock split
"""
LEVEL3_EXAM = """
- An investor who sells winners early and keeps losers most likely shows the
  | disposition effect | illusion of control | availability bias
- A liability-driven investor with fixed future payments first matches | duration
  | dividend yield | tracking error
- Of these, which gives a client the least ability to bear risk? | A short time horizon
  | A large surplus of wealth | A stable salary
- Rebalancing to fixed weights most likely does well in | a market that swings without a trend
  | a market that rises all the time | a market that falls all the time
- A manager who only looks for news that backs an existing view shows | confirmation bias
  | regret aversion | status quo bias
- An overlay that sells foreign currency forward reduces | currency risk | credit risk
  | the number of managers
- A portfolio that needs cash for a known payment in six months should hold for it
  | short-term bills | private equity | long-dated zero-coupon bonds
- The allocation effect in performance attribution measures the choice of
  | sector weights | single securities within sectors | the reporting currency
- A foundation that must keep its purchasing power needs a return of at least
  | spending, inflation and costs | inflation alone | the dividend yield
- Implementation shortfall compares the result of actual trades with | a paper portfolio
  | the closing price a year later | the highest price of the day
"""
REG_EXAM = """
- The return of a calendar-year C corporation is due, without extension, on | April 15
  | March 15 | June 30 | October 15
- The basis of inherited property, with no election, is its
  | fair market value at the date of death | cost to the decedent | assessed tax value
  | cost less depreciation
- For a later gain, the basis of property received as a gift is usually
  | the adjusted basis of the donor | zero | the fair market value at the gift
  | the price of the last sale nearby
- Interest on bonds of a state for its general purposes is, for federal income tax,
  | excluded from gross income | taxed as capital gain | taxed at a flat 15 % | deferred ten years
- An S corporation may have at most | 100 shareholders | 35 shareholders | 500 shareholders
  | 10 shareholders
- Without a large omission or fraud, tax is assessed at the latest | three years after filing
  | one year after filing | ten years after filing | thirty days after filing
- Corporate net capital losses are carried | back three years and forward five
  | forward only, without limit | back ten years | neither back nor forward
- Which contract must be in writing under the statute of frauds? | The sale of land
  | A haircut tomorrow | A one-week job | The sale of a 50 dollar book
- Article 2 of the Uniform Commercial Code applies to the sale of | goods | land | services only
  | shares
- Losses from passive activities that exceed passive income are | suspended and carried forward
  | deducted from wages at once | lost for good | refunded in cash
- A general partner is liable for the debts of the partnership | personally and without limit
  | never | up to the capital paid in | only after five years
- A security interest in equipment is usually perfected by | filing a financing statement
  | telling the press | a spoken promise | renaming the debtor
- Securities are bought back to cause a wash sale when the purchase falls within
  | 30 days before or after the sale | 90 days after the sale | the same hour | two tax years
- Liquidation of a debtor by a trustee is the aim of bankruptcy under | Chapter 7
  | Chapter 11 | Chapter 13 | Chapter 9
"""


def number(value: Decimal) -> str:
    """Write a number with thousands separators and no needless decimals."""
    return f"{value.normalize():,f}"


def cents(value: Decimal) -> str:
    """Round half up to two decimals: the form of every computed key."""
    return str(value.quantize(Decimal("0.01"), ROUND_HALF_UP))


def growth(rate: Decimal) -> Decimal:
    """Turn a rate in percent into a growth factor."""
    return 1 + rate / 100


@dataclass(frozen=True)
class Computed:
    """A question whose choices are computed: ranges of whole numbers, then the formulas."""

    text: str
    draw: dict[str, tuple[int, int, int]]
    right: Callable[[Numbers], Decimal]
    wrong: tuple[Callable[[Numbers], Decimal], ...]


TRAIN_COMPUTED = (
    Computed(
        "What does a deposit of ${a} grow to in {n} years at {r} % a year, compounded yearly?",
        {"a": (1000, 9000, 500), "n": (2, 9, 1), "r": (2, 9, 1)},
        lambda v: v["a"] * growth(v["r"]) ** v["n"],
        (
            lambda v: v["a"] * (1 + v["r"] * v["n"] / 100),
            lambda v: v["a"] / growth(v["r"]) ** v["n"],
        ),
    ),
    Computed(
        "A share is bought at ${a}, pays a dividend of ${d} and is sold at ${b}. What is the "
        "holding period return in percent?",
        {"a": (40, 60, 1), "b": (62, 80, 1), "d": (1, 4, 1)},
        lambda v: (v["b"] - v["a"] + v["d"]) / v["a"] * 100,
        (
            lambda v: (v["b"] - v["a"]) / v["a"] * 100,
            lambda v: (v["b"] - v["a"] + v["d"]) / v["b"] * 100,
        ),
    ),
    Computed(
        "Net income is ${a}, preferred dividends are ${p} and {n} common shares are outstanding "
        "all year. What are basic earnings per share?",
        {"a": (200000, 900000, 50000), "p": (10000, 60000, 10000), "n": (50000, 90000, 5000)},
        lambda v: (v["a"] - v["p"]) / v["n"],
        (lambda v: v["a"] / v["n"], lambda v: (v["a"] + v["p"]) / v["n"]),
    ),
)
LEVEL1_COMPUTED = (
    Computed(
        "What is the present value of ${a} due in {n} years at a discount rate of {r} %?",
        {"a": (2000, 9500, 500), "n": (2, 9, 1), "r": (3, 9, 1)},
        lambda v: v["a"] / growth(v["r"]) ** v["n"],
        (
            lambda v: v["a"] / (1 + v["r"] * v["n"] / 100),
            lambda v: v["a"] * growth(v["r"]) ** v["n"],
        ),
    ),
    Computed(
        "The risk-free rate is {f} %, the market return {m} % and the beta of a share 1.{b}. "
        "What return in percent does the CAPM require?",
        {"f": (1, 4, 1), "m": (6, 11, 1), "b": (1, 9, 1)},
        lambda v: v["f"] + (1 + v["b"] / 10) * (v["m"] - v["f"]),
        (lambda v: v["f"] + (1 + v["b"] / 10) * v["m"], lambda v: (1 + v["b"] / 10) * v["m"]),
    ),
    Computed(
        "A perpetual preferred share pays ${d} a year. At a required return of {r} %, what is it "
        "worth in dollars?",
        {"d": (2, 9, 1), "r": (4, 12, 1)},
        lambda v: v["d"] / v["r"] * 100,
        (lambda v: v["d"] * v["r"], lambda v: v["d"] / (1 + v["r"] / 100)),
    ),
)
LEVEL2_COMPUTED = (
    Computed(
        "A share has just paid ${d}; dividends grow by {g} % a year for ever and the required "
        "return is {r} %. What is its value in dollars by the Gordon growth model?",
        {"d": (1, 6, 1), "g": (2, 4, 1), "r": (7, 12, 1)},
        lambda v: v["d"] * growth(v["g"]) / (v["r"] - v["g"]) * 100,
        (lambda v: v["d"] / (v["r"] - v["g"]) * 100, lambda v: v["d"] / v["r"] * 100),
    ),
    Computed(
        "Spot is 1.{s} units of currency D per unit of F. One-year rates are {d} % in D and {f} % "
        "in F. What is the one-year forward rate by covered interest parity?",
        {"s": (11, 49, 2), "d": (5, 9, 1), "f": (1, 4, 1)},
        lambda v: (1 + v["s"] / 100) * growth(v["d"]) / growth(v["f"]),
        (
            lambda v: (1 + v["s"] / 100) * growth(v["f"]) / growth(v["d"]),
            lambda v: (1 + v["s"] / 100) * growth(v["d"]),
        ),
    ),
    Computed(
        "Cash flow from operations is ${c} million, capital expenditure ${x} million and net "
        "borrowing ${b} million. What is the free cash flow to equity in millions of dollars?",
        {"c": (200, 400, 10), "x": (50, 150, 10), "b": (10, 45, 5)},
        lambda v: v["c"] - v["x"] + v["b"],
        (lambda v: v["c"] - v["x"] - v["b"], lambda v: v["c"] + v["x"] + v["b"]),
    ),
)
LEVEL3_COMPUTED = (
    Computed(
        "A portfolio has an expected return of {e} % and a standard deviation of {s} %; the least "
        "acceptable return is {t} %. What is its safety-first ratio?",
        {"e": (7, 12, 1), "s": (8, 20, 1), "t": (2, 5, 1)},
        lambda v: (v["e"] - v["t"]) / v["s"],
        (lambda v: v["e"] / v["s"], lambda v: (v["e"] + v["t"]) / v["s"]),
    ),
    Computed(
        "A bond fund has a modified duration of {d}. Yields rise by {b} basis points. By duration "
        "alone, how many percent of its value does the fund lose?",
        {"d": (3, 11, 1), "b": (25, 90, 5)},
        lambda v: v["d"] * v["b"] / 100,
        (lambda v: v["d"] * v["b"] / 1000, lambda v: v["d"] / v["b"] * 100),
    ),
    Computed(
        "A client has assets of ${a} and liabilities worth ${l}. The assets gain {r} % while the "
        "liabilities stay the same. What is the new surplus in dollars?",
        {"a": (500000, 900000, 50000), "l": (200000, 450000, 50000), "r": (2, 9, 1)},
        lambda v: v["a"] * growth(v["r"]) - v["l"],
        (lambda v: (v["a"] - v["l"]) * growth(v["r"]), lambda v: v["a"] - v["l"]),
    ),
)
REG_COMPUTED = (
    Computed(
        "A taxpayer sells land with an adjusted basis of ${b} for ${c} in cash; the buyer also "
        "takes over its mortgage of ${m}. What gain in dollars is realized?",
        {"b": (40000, 60000, 5000), "c": (70000, 95000, 5000), "m": (10000, 30000, 5000)},
        lambda v: v["c"] + v["m"] - v["b"],
        (
            lambda v: v["c"] - v["b"],
            lambda v: v["c"] + v["m"],
            lambda v: v["c"] - v["m"],
        ),
    ),
    Computed(
        "A partner has a basis of ${b}, is allocated ordinary income of ${i} and receives a cash "
        "distribution of ${d}; debts do not change. What is the partner's new basis in dollars?",
        {"b": (20000, 40000, 2000), "i": (8000, 15000, 1000), "d": (3000, 7000, 1000)},
        lambda v: v["b"] + v["i"] - v["d"],
        (
            lambda v: v["b"] + v["i"],
            lambda v: v["b"] - v["d"],
            lambda v: v["b"] + v["i"] + v["d"],
        ),
    ),
    Computed(
        "In a like-kind exchange land with a basis of ${b} is given for land worth ${w} and ${k} "
        "in cash; there is no debt. What gain in dollars is recognized?",
        {"b": (30000, 40000, 2000), "w": (60000, 80000, 5000), "k": (5000, 12000, 1000)},
        lambda v: min(v["k"], v["w"] + v["k"] - v["b"]),
        (
            lambda v: v["w"] + v["k"] - v["b"],
            lambda v: v["w"] - v["b"],
            lambda v: Decimal(0),
        ),
    ),
)

# ---------------------------------------------------------------- XBRL tagging
# tag | sentence; {x} is the number asked for

TRAIN_TAGGING = """
- Revenues | Total revenues were ${x} million for the year, the highest since the company began.
- DebtInstrumentFaceAmount | In {m} the company issued senior notes with a principal of ${x}
  million.
- DebtInstrumentInterestRateStatedPercentage | The notes due {y2} carry a fixed coupon of {x} %.
- LineOfCreditFacilityMaximumBorrowingCapacity | The revolving facility lets us borrow up to ${x}
  million.
- GoodwillImpairmentLoss | We wrote down goodwill by ${x} million after the yearly test.
- Goodwill | Goodwill stood at ${x} million on the balance sheet at year end.
- AmortizationOfIntangibleAssets | Amortization of customer lists and patents came to ${x} million.
- Depreciation | Depreciation of plant and equipment was ${x} million in {y}.
- RestructuringCharges | Closing the {city} site led to restructuring charges of ${x} million.
- OperatingLeaseExpense | Rent under operating leases, shown as lease cost, was ${x} million.
- ShareBasedCompensation | Share-based compensation added back in cash flows was ${x} million.
- EffectiveIncomeTaxRateContinuingOperations | Our effective tax rate for {y} was {x} %.
- UnrecognizedTaxBenefits | Unrecognized tax benefits totaled ${x} million at year end.
- IncomeTaxExpenseBenefit | We booked an income tax provision of ${x} million.
- InterestExpense | Interest on our borrowings cost ${x} million in {y}.
- StockRepurchaseProgramAuthorizedAmount | The board authorized the buyback of up to ${x} million
  of shares.
- CommonStockDividendsPerShareDeclared | The board declared dividends of ${x} per common share.
- NumberOfReportableSegments | The company reports its results in {x} segments.
- EquityMethodInvestmentOwnershipPercentage | We account for our {x} % stake in {co} by the equity
  method.
- BusinessCombinationConsiderationTransferred1 | The purchase price of {co}, all paid at closing,
  was ${x} million.
- LossContingencyAccrualAtCarryingValue | We accrued ${x} million for the pending lawsuit.
- CapitalizedContractCostAmortization | Capitalized sales commissions of ${x} million were
  amortized.
- AllowanceForDoubtfulAccountsReceivable | The allowance against trade receivables was ${x} million.
- ConcentrationRiskPercentage | One customer made up {x} % of our sales.
- LettersOfCreditOutstandingAmount | Letters of credit of ${x} million were outstanding.
- PaymentsToAcquireBusinessesNetOfCashAcquired | Cash paid for acquisitions, less cash acquired,
  was ${x} million.
"""
TEST_TAGGING = """
- Revenues | In the year ended {m} {y} our revenues reached ${x} million.
- DebtInstrumentFaceAmount | The term loan was drawn in full, with a face amount of ${x} million.
- DebtInstrumentInterestRateStatedPercentage | Interest accrues on the bonds at a stated {x} % a
  year.
- LineOfCreditFacilityMaximumBorrowingCapacity | A new credit line has a maximum capacity of ${x}
  million.
- GoodwillImpairmentLoss | A goodwill impairment of ${x} million hit the {city} unit.
- AmortizationOfIntangibleAssets | Intangible assets were amortized by ${x} million this year.
- Depreciation | Machines and buildings lost ${x} million in value through depreciation.
- RestructuringCharges | Severance and other restructuring costs amounted to ${x} million.
- ShareBasedCompensation | Non-cash pay in the form of shares and options was ${x} million.
- EffectiveIncomeTaxRateContinuingOperations | Taxes took {x} % of pretax income, our effective
  rate.
- UnrecognizedTaxBenefits | At {m} {day} the total of unrecognized tax benefits was ${x} million.
- InterestExpense | Interest expense rose to ${x} million with the new loans.
- StockRepurchaseProgramAuthorizedAmount | Under the repurchase plan up to ${x} million may be
  spent.
- CommonStockDividendsPerShareDeclared | Declared dividends came to ${x} a share in {y}.
- NumberOfReportableSegments | There are {x} reportable segments, each with its own manager.
- EquityMethodInvestmentOwnershipPercentage | Our {x} % interest in {co} is an equity method
  investment.
- LossContingencyAccrualAtCarryingValue | A reserve of ${x} million covers the claims filed in
  {city}.
- ConcentrationRiskPercentage | The largest buyer took {x} % of total net sales.
- LettersOfCreditOutstandingAmount | The bank had issued ${x} million in letters of credit for us.
"""
FNXL_TAGGING = """
- AdvertisingExpense | We spent ${x} million on advertising, all of it expensed when incurred.
- ResearchAndDevelopmentExpense | Research and development expense was ${x} million in {y}.
- FiniteLivedIntangibleAssetUsefulLife | Acquired patents are amortized over {x} years.
- PropertyPlantAndEquipmentUsefulLife | Machines have a useful life of {x} years.
- ProceedsFromIssuanceOfLongTermDebt | Long-term debt issued in {m} brought in ${x} million.
- RepaymentsOfDebt | We repaid ${x} million of our debt before it fell due.
- DefinedContributionPlanCostRecognized | Our payments to the savings plan of staff were ${x}
  million.
- ContractWithCustomerLiability | Advances from customers, our contract liability, were ${x}
  million.
- IncomeTaxesPaid | Cash taxes of ${x} million were paid in {y}.
- OperatingLeaseLiability | The liability for operating leases was ${x} million.
- CashAndCashEquivalentsAtCarryingValue | Cash and cash equivalents came to ${x} million.
- InventoryWriteDown | Slow-moving goods led to an inventory write-down of ${x} million.
- SaleOfStockPricePerShare | New shares were sold to {co} at ${x} per share.
- AntidilutiveSecuritiesExcludedFromComputationOfEarningsPerShareAmount | Options on {x} million
  shares were left out of diluted earnings per share as antidilutive.
- DerivativeNotionalAmount | Currency forwards had a notional amount of ${x} million.
- AssetImpairmentCharges | Idle assets in {city} were impaired by ${x} million.
"""

# ---------------------------------------------------------------- XBRL terms
# term | what it means, in our words

TRAIN_TERMS = """
- Accounts Payable, Current | What the company owes its suppliers and must pay within a year.
- Accounts Receivable, Net, Current | What customers still have to pay within a year, after taking
  off the part that is unlikely to be collected.
- Additional Paid in Capital | What shareholders paid for their shares above the par value.
- Assets, Current | Cash and all that should turn into cash or be used up within a year.
- Cost of Revenue | What it cost to make and deliver the goods and services that were sold.
- Deferred Revenue, Current | Payments received for goods or services to be supplied within a year.
- Earnings Per Share, Basic | The profit that belongs to one common share on average in the period.
- Finite-Lived Intangible Assets, Net | Intangible assets with a limited life, less amortization so
  far.
- Gross Profit | Revenue that is left after the cost of the goods and services sold.
- Income Tax Expense (Benefit) | The tax on the income of the period, paid now or later.
- Inventory, Net | Goods held for sale or production, after write-downs to a lower value.
- Long-term Debt, Noncurrent | Borrowings that do not have to be repaid within a year.
- Net Cash Provided by (Used in) Financing Activities | Cash received from lenders and owners, less
  cash paid back to them.
- Operating Income (Loss) | The result of the normal business before interest and taxes.
- Other Comprehensive Income (Loss), Net of Tax | Gains and losses of the period that bypass the
  income statement, after tax.
- Payments to Acquire Property, Plant, and Equipment | Cash spent on buying buildings, machines and
  the like.
- Prepaid Expense, Current | Costs paid ahead of time that will be used up within a year.
- Proceeds from Issuance of Common Stock | Cash that came in from selling new common shares.
- Research and Development Expense | What was spent on finding and designing new products or
  methods.
- Retained Earnings (Accumulated Deficit) | All past profits that were kept in the company, less
  past
  losses.
- Selling, General and Administrative Expense | The cost of selling the products and running the
  company, apart from making them.
- Stockholders' Equity | What is left for the owners once all liabilities are taken off the assets.
- Treasury Stock, Value | What the company paid for its own shares that it has bought back.
- Weighted Average Number of Shares Outstanding, Basic | The average count of shares in the hands of
  owners over the period, weighted by time.
- Business Acquisition, Goodwill, Expected Tax Deductible Amount | The part of the goodwill from a
  purchase that can be deducted for tax.
- Capital Lease Obligations | What is still owed under leases that are treated like a purchase.
"""
TEST_TERMS = """
- Accrued Liabilities, Current | Costs that have been incurred, are not paid yet and fall due within
  a year.
- Assets | The total of all that the company owns and controls.
- Cash and Cash Equivalents, at Carrying Value | Money at hand and in banks, with investments so
  short that their value hardly moves.
- Commercial Paper | Short-term notes without security that the company sold to borrow money.
- Common Stock, Shares Outstanding | The count of common shares that owners hold now.
- Contract with Customer, Liability | What is owed to customers in goods or services because they
  have paid ahead.
- Deferred Income Tax Expense (Benefit) | The part of the tax cost that will be paid or saved in
  later years.
- Depreciation | The cost of long-lived assets that is charged to the period as they wear out.
- Dividends Payable | Dividends that were declared and have still to be paid.
- Earnings Per Share, Diluted | The profit per common share if all options and the like became
  shares.
- Goodwill | What was paid for a business above the fair value of its single net assets.
- Goodwill, Impairment Loss | The amount by which goodwill was written down in the period.
- Impairment of Long-Lived Assets Held-for-use | The write-down of assets in use that will not earn
  back their cost.
- Interest Expense | What it cost to borrow money in the period.
- Liabilities, Current | What has to be paid or settled within a year.
- Minority Interest | The share of subsidiaries' equity that belongs to other owners.
- Net Cash Provided by (Used in) Operating Activities | Cash that the normal business brought in,
  less what it used up.
- Operating Lease, Liability | The present value of payments still due under operating leases.
- Payments of Dividends | Cash paid out to shareholders as dividends.
- Payments for Repurchase of Common Stock | Cash spent on buying back the company's own common
  shares.
- Net Income (Loss), Including Portion Attributable to Noncontrolling Interest | The result of the
  period after tax, with the share of minority owners.
- Property, Plant and Equipment, Net | Buildings, machines and the like, less depreciation so far.
- Restructuring Charges | The cost of closing sites, cutting jobs and other rebuilding of the
  company.
- Revenues | All income from the sale of goods and services in the period.
- Share-based Compensation | Pay in shares and options that cost no cash in the period.
"""

# ---------------------------------------------------------------- XBRL extraction

CONCEPTS = {
    "Revenues": "total revenues",
    "CostOfRevenue": "cost of revenue",
    "GrossProfit": "gross profit",
    "OperatingExpenses": "operating expenses",
    "OperatingIncomeLoss": "operating income",
    "IncomeTaxExpenseBenefit": "income tax expense",
    "ProfitLoss": "profit or loss including noncontrolling interests",
    "AssetsCurrent": "current assets",
    "Assets": "total assets",
    "LiabilitiesCurrent": "current liabilities",
    "Liabilities": "total liabilities",
    "StockholdersEquity": "stockholders' equity",
    "InventoryNet": "net inventory",
    "InterestExpense": "interest expense",
}
BALANCE_CONCEPTS = (
    "AssetsCurrent",
    "Assets",
    "LiabilitiesCurrent",
    "Liabilities",
    "StockholdersEquity",
    "InventoryNet",
)

# ratio -> numerator, denominator, in percent or not
RATIOS = {
    "net profit margin": ("ProfitLoss", "Revenues", True),
    "gross profit margin": ("GrossProfit", "Revenues", True),
    "operating margin": ("OperatingIncomeLoss", "Revenues", True),
    "return on assets": ("ProfitLoss", "Assets", True),
    "return on equity": ("ProfitLoss", "StockholdersEquity", True),
    "equity ratio": ("StockholdersEquity", "Assets", True),
    "current ratio": ("AssetsCurrent", "LiabilitiesCurrent", False),
    "debt to equity ratio": ("Liabilities", "StockholdersEquity", False),
    "asset turnover": ("Revenues", "Assets", False),
    "interest coverage ratio": ("OperatingIncomeLoss", "InterestExpense", False),
}

EXTRACT_KINDS = ("tags", "value", "formula", "formula_calculations")
TRAIN_EXTRACT = {
    "tags": "Which XBRL tag does {co} use for its {what} in fiscal year {y}?",
    "value": "What {what} does {co} report for fiscal year {y}?",
    "formula": "Which formula in XBRL tags gives the {ratio} of {co}{pct} for fiscal year {y}?",
    "formula_calculations": "Which formula, with numbers put in, gives the {ratio} of {co}{pct} "
    "for fiscal year {y}?",
}
TEST_EXTRACT = {
    "tags": "In the filing of {co}, what is the XBRL tag of the fact for {what} of {y}?",
    "value": "According to the filing of {co}, what is the amount of {what} for {y}?",
    "formula": "Write the formula for the {ratio}{pct} of {co} in {y} with XBRL tags.",
    "formula_calculations": "Put the reported numbers of {co} into the formula for its "
    "{ratio}{pct} in {y}.",
}
EXTRACT_FORMS = {
    "tags": "Answer with one tag and nothing else, such as us-gaap:AccountsPayableCurrent.",
    "value": "Answer with the value as it stands in the XML and nothing else, such as 1250000.",
    "formula": "Answer with the formula and nothing else, such as (us-gaap:NetIncomeLoss / "
    "us-gaap:SalesRevenueNet) * 100.",
    "formula_calculations": "Answer with the formula and nothing else; do not work it out. "
    "Example: (1250000 / 20000000) * 100.",
}

# ---------------------------------------------------------------- financial math


@dataclass(frozen=True)
class Formula:
    """A formula, the ranges its inputs are drawn from and its solution."""

    name: str
    formula: str
    explanation: str
    draw: dict[str, tuple[int, int, int]]
    solve: Callable[[Numbers], Decimal]


FORMULAS = (
    Formula(
        "Net Present Value (NPV)",
        "NPV = sum of R_t / (1 + i)^t for t = 1 to n, minus C_0",
        "R_t: Cash inflow at the end of year t, i: Discount rate per year, n: Number of years, "
        "C_0: Outlay at the start",
        {"c": (8000, 24000, 500), "a": (3000, 9000, 250), "i": (4, 12, 1), "n": (3, 7, 1)},
        lambda v: (
            sum((v["a"] / growth(v["i"]) ** t for t in range(1, int(v["n"]) + 1)), Decimal(0))
            - v["c"]
        ),
    ),
    Formula(
        "Future Value (FV)",
        "FV = PV * (1 + r)^n",
        "PV: Present value, r: Interest rate per period, n: Number of periods",
        {"a": (1000, 40000, 500), "r": (2, 9, 1), "n": (2, 15, 1)},
        lambda v: v["a"] * growth(v["r"]) ** v["n"],
    ),
    Formula(
        "Present Value (PV)",
        "PV = FV / (1 + r)^n",
        "FV: Future value, r: Discount rate per period, n: Number of periods",
        {"a": (2000, 60000, 500), "r": (2, 10, 1), "n": (2, 15, 1)},
        lambda v: v["a"] / growth(v["r"]) ** v["n"],
    ),
    Formula(
        "Compound Annual Growth Rate (CAGR)",
        "CAGR = ((V_end / V_start)^(1 / n) - 1) * 100",
        "V_end: Value at the end, V_start: Value at the start, n: Number of years",
        {"a": (10000, 40000, 1000), "b": (45000, 90000, 1000), "n": (3, 10, 1)},
        lambda v: ((v["b"] / v["a"]) ** (1 / v["n"]) - 1) * 100,
    ),
    Formula(
        "Simple Interest",
        "SI = P * r * t",
        "P: Principal, r: Interest rate per year, t: Time in years",
        {"a": (500, 30000, 500), "r": (2, 12, 1), "t": (1, 8, 1)},
        lambda v: v["a"] * v["r"] / 100 * v["t"],
    ),
    Formula(
        "Compound Interest",
        "A = P * (1 + r / n)^(n * t)",
        "A: Final amount, P: Principal, r: Interest rate per year, "
        "n: Compounding periods per year, t: Time in years",
        {"a": (1000, 30000, 500), "r": (2, 9, 1), "n": (2, 4, 2), "t": (2, 10, 1)},
        lambda v: v["a"] * (1 + v["r"] / 100 / v["n"]) ** (v["n"] * v["t"]),
    ),
    Formula(
        "Return on Investment (ROI)",
        "ROI = (Proceeds - Cost) / Cost * 100",
        "Proceeds: What the investment brought in, Cost: What it cost",
        {"a": (4000, 20000, 250), "b": (20500, 40000, 250)},
        lambda v: (v["b"] - v["a"]) / v["a"] * 100,
    ),
    Formula(
        "Gross Profit Margin",
        "Gross Profit Margin = (Revenue - Cost of Goods Sold) / Revenue * 100",
        "Revenue: Sales of the period, Cost of Goods Sold: Direct cost of what was sold",
        {"a": (200000, 900000, 5000), "b": (80000, 190000, 5000)},
        lambda v: (v["a"] - v["b"]) / v["a"] * 100,
    ),
    Formula(
        "Net Profit Margin",
        "Net Profit Margin = Net Income / Revenue * 100",
        "Net Income: Profit after all costs and taxes, Revenue: Sales of the period",
        {"a": (200000, 900000, 5000), "b": (10000, 90000, 2500)},
        lambda v: v["b"] / v["a"] * 100,
    ),
    Formula(
        "Operating Margin",
        "Operating Margin = Operating Income / Revenue * 100",
        "Operating Income: Profit before interest and taxes, Revenue: Sales of the period",
        {"a": (300000, 950000, 5000), "b": (20000, 150000, 2500)},
        lambda v: v["b"] / v["a"] * 100,
    ),
    Formula(
        "Current Ratio",
        "Current Ratio = Current Assets / Current Liabilities",
        "Current Assets: Assets due within a year, Current Liabilities: Debts due within a year",
        {"a": (60000, 400000, 5000), "b": (30000, 200000, 5000)},
        lambda v: v["a"] / v["b"],
    ),
)

# formula | question
TRAIN_QUESTIONS = """
- Net Present Value (NPV) | A bakery pays ${c} today for an oven that saves ${a} at the end of
  each of the next {n} years. What is the NPV at {i} %?
- Net Present Value (NPV) | An outlay of ${c} now returns ${a} a year, at year end, for {n}
  years. Find the NPV with a discount rate of {i} %.
- Future Value (FV) | What will ${a} be worth after {n} years if it earns {r} % a year?
- Future Value (FV) | Mira puts ${a} aside at {r} % a year. How much does she have {n} years
  later?
- Present Value (PV) | A bill of ${a} falls due in {n} years. What is it worth today at {r} % a
  year?
- Present Value (PV) | How much must be invested now at {r} % a year to reach ${a} in {n} years?
- Compound Annual Growth Rate (CAGR) | Sales went from ${a} to ${b} in {n} years. What was the
  CAGR in percent?
- Compound Annual Growth Rate (CAGR) | A plot bought for ${a} is worth ${b} after {n} years. Give
  the CAGR in percent.
- Simple Interest | How much simple interest does a loan of ${a} cost at {r} % a year over {t}
  years?
- Simple Interest | A note over ${a} pays {r} % simple interest a year. What interest is due for
  a term of {t} years?
- Compound Interest | ${a} earns {r} % a year, compounded {n} times a year. What is the amount
  after {t} years?
- Compound Interest | A deposit of ${a} is credited with interest {n} times a year at a yearly
  rate of {r} %. What amount is there after {t} years?
- Return on Investment (ROI) | A stall that cost ${a} was sold for ${b}. What is the ROI in
  percent?
- Return on Investment (ROI) | An advertisement for ${a} brought in ${b}. Compute the ROI in
  percent.
- Gross Profit Margin | Revenue is ${a} and the goods sold cost ${b}. What is the gross profit
  margin in percent?
- Gross Profit Margin | A brewery sells for ${a} what cost it ${b} to make. Find its gross profit
  margin in percent.
- Net Profit Margin | Net income is ${b} on revenue of ${a}. What is the net profit margin in
  percent?
- Net Profit Margin | A garage took in ${a} and kept ${b} after all costs and taxes. What is its
  net profit margin in percent?
- Operating Margin | With revenue of ${a} and operating income of ${b}, what is the operating
  margin in percent?
- Operating Margin | A hotel earned ${b} before interest and taxes on sales of ${a}. Give its
  operating margin in percent.
- Current Ratio | Current assets are ${a}, current liabilities ${b}. What is the current ratio?
- Current Ratio | A nursery has ${a} in current assets and owes ${b} within a year. Find its
  current ratio.
"""
TEST_QUESTIONS = """
- Net Present Value (NPV) | A ferry line can buy a ticket system for ${c} that brings in ${a}
  every year end for {n} years. At a discount rate of {i} %, what is its NPV?
- Future Value (FV) | A fund starts with ${a} and gains {r} % every year. Find its value at the
  end of year {n}.
- Present Value (PV) | Discount a single payment of ${a}, received {n} years from now, at {r} % a
  year.
- Compound Annual Growth Rate (CAGR) | A club's income was ${a} at first and ${b} after {n}
  years. At what CAGR, in percent, did it grow?
- Simple Interest | Ines lends ${a} to her brother for {t} years at simple interest of {r} %.
  What does she earn?
- Compound Interest | With {n} interest dates a year and a rate of {r} % a year, what does ${a}
  become in {t} years?
- Return on Investment (ROI) | Shares bought for ${a} were later sold for ${b} with no fees. How
  many percent is the ROI?
- Gross Profit Margin | Out of sales of ${a}, ${b} goes to the cost of goods sold. State the
  gross profit margin in percent.
- Net Profit Margin | In a year with sales of ${a}, a printer keeps ${b} as net income. How large
  is the net profit margin in percent?
- Operating Margin | Operating income came to ${b} in a year with sales of ${a}. What operating
  margin in percent is that?
- Current Ratio | How high is the current ratio of a shop that owes ${b} in the short term and
  has short-term assets of ${a}?
"""

# ---------------------------------------------------------------- financebench
# question | answer | page; ";;" in the page is a new line

TRAIN_PAGES = """
- How much did the revenue of {co} grow from FY{y0} to FY{y}, in percent? | {growth} %
  | Consolidated Statements of Income ;; (In millions) ;; Revenue {y} {y0} ;; $ {rev} $ {rev0} ;;
  Cost of revenue ;; {cost} {cost0} ;; The accompanying notes are part of these statements.
- What was the capital expenditure of {co} in FY{y}, in millions of US dollars? | ${capex} million
  | Cash Flows from Investing Activities ;; Purchases of plant and equipment ;; ({capex}) ({capex0})
  ;; Sales of marketable securities ;; 12 9 ;; Years ended December 31, {y} and {y0}, in millions
- Which segment of {co} had the larger revenue in FY{y}? | {big_segment}
  | Note 14 - Segments ;; Revenue by segment, {y} (In millions) ;; {seg1} {rev1} ;; {seg2} {rev2} ;;
  Total {rev} ;; Segment managers report to the chief executive officer.
- Who audits the statements of {co}? | {auditor}
  | Report of Independent Registered Public Accounting Firm ;; To the shareholders of {co} ;; In our
  opinion the statements present fairly the financial position at December 31, {y}. ;; {auditor}
- How many people did {co} employ at the end of FY{y}? | {staff} people
  | Item 1. Business ;; Human Capital ;; At December 31, {y} we had {staff} employees, of whom about
  a third worked in {city}. ;; We believe that relations with our staff are good.
- Does {co} report legal proceedings that could be material in FY{y}? | Yes. A customer in {city}
  claims ${claim} million for {prod} of poor quality. | Item 3. Legal Proceedings ;; In {m} {y} a
  customer in
  {city} filed a claim for ${claim} million against us, ;; alleging that {prod} we supplied were
  of poor quality. An adverse outcome could be material.
- What was the current ratio of {co} at the end of FY{y}? | {cr}
  | Consolidated Balance Sheets ;; December 31, {y} (In millions) ;; Total current assets ;; {ca} ;;
  Property and equipment, net ;; {ppe} ;; Total current liabilities ;; {cl} ;; Long-term debt ;;
  {debt}
"""
TEST_PAGES = """
- What is the FY{y} gross margin of {co} in percent? | {gm} %
  | Statements of Operations ;; Year ended December 31, {y} ;; (Dollars in millions) ;; Net sales ;;
  Cost of sales ;; {rev} ;; {cost} ;; Selling expenses are described in Note 6.
- By how many percent did sales of {co} change in FY{y} against FY{y0}? | Sales rose by {growth} %.
  | Results of Operations ;; Net sales were ${rev} million in {y}, against ${rev0} million in {y0}.
  ;; The change came mostly from higher volumes of {prod}.
- Where are the headquarters of {co}? | In {city}.
  | Item 2. Properties ;; Our headquarters are in {city}, where we own the land and buildings. ;; We
  also lease warehouses in {city2} under leases that end by {y2}.
- What did {co} spend on research and development in FY{y}? | ${rd} million
  | Operating expenses (in millions) {y} {y0} ;; Selling and administration ;; {sga} {sga0} ;;
  Research and development ;; {rd} {rd0} ;; Depreciation is included in the lines above.
- Did {co} buy back shares in FY{y}? | Yes, for ${claim} million.
  | Item 5. Market for Common Equity ;; During {y} we repurchased {staff} thousand shares for
  ${claim}
  million in cash. ;; We may spend a further ${debt} million under the plan of the board.
- What is the free cash flow of {co} in FY{y}, as operating cash flow less capital expenditure?
  | ${fcf} million | Liquidity and Capital Resources ;; (In millions) {y} ;; Cash from operating
  activities {ocf} ;; Capital expenditure ({capex}) ;; Dividends paid (21) ;; We expect to meet our
  needs for the next twelve months.
- What share of FY{y} revenue of {co} came from {seg1}, in percent? | {seg1_share} %
  | Disaggregation of revenue ;; {seg1} ;; {seg2} ;; Total ;; ${rev1} ;; {rev2} ;; ${rev} ;; All
  amounts are in millions for the year {y}.
"""
SEGMENTS = names("Industrial Pumps, Home Products, Services, Marine Systems, Software, Packaging")
AUDITORS = names("Ellery & Strand LLP, Morrowgate & Partners LLP, Tollen Birch LLP")

# ---------------------------------------------------------------- filling the slots


def pick_values(rng: random.Random, companies: list[str]) -> Values:
    """Draw one value for every slot, consistent with each other (hi is above lo)."""
    co, co2 = rng.sample(companies, 2)
    city, city2 = rng.sample(CITIES, 2)
    prod, prod2 = rng.sample(PRODUCTS, 2)
    p, p2 = rng.sample(PEOPLE, 2)
    currency = rng.choice(("EUR {} mn", "EUR {} million", "USD {} million", "${} million"))
    sign = rng.choice(("%", " %"))
    low = Decimal(rng.randint(31, 640)) / 10
    high = (low * Decimal(rng.randint(108, 160)) / 100).quantize(Decimal("0.1"), ROUND_HALF_UP)
    year = rng.randint(2021, 2025)
    dividend = rng.randint(12, 90)
    strike = rng.randint(14, 90)

    def percent(value: Decimal | int) -> str:
        return f"{value}{sign}"

    return {
        "co": co,
        "co2": co2,
        "tick": co.split()[0][:4].upper(),
        "city": city,
        "city2": city2,
        "prod": prod,
        "prod2": prod2,
        "p": p,
        "p2": p2,
        "role": rng.choice(ROLES),
        "broker": rng.choice(BROKERS),
        "q": rng.choice(QUARTERS),
        "qn": str(rng.randint(1, 4)),
        "m": rng.choice(MONTHS),
        "day": str(rng.randint(2, 28)),
        "y": str(year),
        "y0": str(year - 1),
        "y2": str(year + rng.randint(2, 5)),
        "n": str(rng.randrange(60, 620, 10)),
        "few": str(rng.randint(5, 14)),
        "tt": str(rng.randint(21, 89)),
        "kilo": f"{rng.randrange(3, 60)},{rng.choice((200, 400, 500, 800))}",
        "sh": f"{rng.randint(1, 9)},{rng.randint(100, 999)},{rng.choice((250, 400, 750, 900))}",
        "lo": currency.format(low),
        "hi": currency.format(high),
        "up": percent(((high / low - 1) * 100).quantize(Decimal("0.1"), ROUND_HALF_UP)),
        "dn": percent(((1 - low / high) * 100).quantize(Decimal("0.1"), ROUND_HALF_UP)),
        "amt": currency.format(Decimal(rng.randint(25, 950)) / 10),
        "big": currency.format(rng.randrange(40, 400, 5)),
        "elo": f"EUR {cents(Decimal(dividend) / 100)}",
        "ehi": f"EUR {cents(Decimal(dividend + rng.randint(3, 20)) / 100)}",
        "pct": percent(rng.randint(5, 15)),
        "share": percent(Decimal(rng.randint(51, 299)) / 10),
        "tiny": percent(Decimal(rng.randint(4, 14)) / 10),
        "mid": percent(rng.randint(12, 24)),
        "crash": percent(rng.randint(46, 78)),
        "strike": str(strike),
        "plo": str(strike),
        "phi": str(strike + rng.randint(4, 18)),
        "usd": str(rng.randint(3, 28)),
        "oz": f"{rng.randint(1, 3)},{rng.randrange(310, 990, 5)}",
    }


def fill_each(
    templates: list[str], times: int, rng: random.Random, companies: list[str]
) -> list[str]:
    """Fill every template so many times; no sentence comes out twice."""
    done: dict[str, None] = {}
    for template in templates:
        goal = len(done) + times
        while len(done) < goal:
            done[template.format_map(pick_values(rng, companies))] = None
    return list(done)


def draw_numbers(ranges: dict[str, tuple[int, int, int]], rng: random.Random) -> Numbers:
    """Draw a whole number from each range (low, high, step)."""
    return {
        name: Decimal(rng.randrange(low, high + 1, step))
        for name, (low, high, step) in ranges.items()
    }


def shown(values: Numbers) -> Values:
    """The same numbers as they stand in a question."""
    return {name: number(value) for name, value in values.items()}


# ---------------------------------------------------------------- rows


def sentiment_rows(
    sentences: dict[str, str],
    times: int,
    rng: random.Random,
    companies: list[str],
    *,
    noun: str = "news",
    labels: tuple[str, ...] = SENTIMENT_LABELS,
) -> list[Row]:
    """Fill the templates of each label and put them into the sentiment prompt."""
    rows = [
        {
            "context": f"Instruction: What is the sentiment of this {noun}? Please choose an "
            f"answer from {{{'/'.join(labels)}}}.\nInput: {sentence}\nAnswer: ",
            "target": label,
        }
        for label, block in sentences.items()
        for sentence in fill_each(items(block), times, rng, companies)
    ]
    rng.shuffle(rows)
    return rows


def headline_rows(block: str, rng: random.Random, companies: list[str]) -> list[Row]:
    """Ask of each headline some questions that are true of it and some that are not."""
    rows = []
    for template, true, false in fields(block):
        headline = template.format_map(pick_values(rng, companies))
        kinds_by_answer = {"Yes": true.split(", ") if true != "-" else [], "No": false.split(", ")}
        for answer, kinds in kinds_by_answer.items():
            for kind in rng.sample(kinds, min(2, len(kinds))):
                context = (
                    f"Instruction: {HEADLINE_QUESTIONS[kind]} Please choose an answer from "
                    f"{{Yes/No}}.\nInput: {headline}\nAnswer: "
                )
                rows.append({"context": context, "target": answer})
    rng.shuffle(rows)
    return rows


def entity_rows(
    block: str, rng: random.Random, orgs: list[str], people: list[str], places: list[str]
) -> list[Row]:
    """Ask for the type of each of the three entities in every sentence."""
    rows = []
    for template in items(block):
        entities = {
            "organization": rng.choice(orgs),
            "person": rng.choice(people),
            "location": rng.choice(places),
        }
        sentence = template.format(
            org=entities["organization"], per=entities["person"], loc=entities["location"]
        )
        for label, entity in entities.items():
            options = ", ".join(rng.sample(ENTITY_LABELS, 3))
            context = (
                f'Instruction: What type of entity is "{entity}" in the input sentence?\n'
                f"Options: {options}\nInput: {sentence}\nAnswer: "
            )
            rows.append({"context": context, "target": label})
    rng.shuffle(rows)
    return rows


def exam_row(question: str, right: str, wrong: list[str], rng: random.Random) -> Row:
    """Shuffle the choices and name the right one by its letter."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=False)]
    letters = ", ".join("ABCD"[: len(choices) - 1]) + f" or {'ABCD'[len(choices) - 1]}"
    return {
        "context": f"Read the question and pick the best of the choices {letters}. Answer with its "
        f"letter and text.\nQuestion: {question}\nChoices:\n" + "\n".join(lettered) + "\nAnswer: ",
        "target": lettered[choices.index(right)],
    }


def exam_rows(
    block: str, computed: tuple[Computed, ...], times: int, rng: random.Random
) -> list[Row]:
    """The written questions, then each computed one so many times."""
    rows = [
        exam_row(question, right, list(wrong), rng) for question, right, *wrong in fields(block)
    ]
    questions: set[str] = set()
    for spec in computed:
        goal = len(questions) + times
        while len(questions) < goal:
            values = draw_numbers(spec.draw, rng)
            question = spec.text.format_map(shown(values))
            right = cents(spec.right(values))
            wrong = [cents(solve(values)) for solve in spec.wrong]
            if question not in questions and len({right, *wrong}) == 1 + len(wrong):
                questions.add(question)
                rows.append(exam_row(question, right, wrong, rng))
    rng.shuffle(rows)
    return rows


def tagging_number(tag: str, rng: random.Random) -> str:
    """A number of a size that fits the tag."""
    ranges = {"Stated": (2, 8), "TaxRate": (14, 28), "Concentration": (10, 38), "Owner": (20, 48)}
    for part, (low, high) in ranges.items():
        if part in tag:
            return f"{rng.randint(low, high)}.{rng.randint(1, 9)}"
    if "PerShare" in tag and not tag.endswith("Amount"):
        return f"{rng.randint(0, 3)}.{rng.randint(11, 98)}"
    if "UsefulLife" in tag or tag.startswith("NumberOf"):
        return str(rng.randint(3, 9))
    return f"{rng.randint(2, 340)}.{rng.randint(1, 9)}"


def tagging_rows(block: str, count: int, rng: random.Random, companies: list[str]) -> list[Row]:
    """Put four tagging questions into one prompt; the answer is a list of four tags."""
    templates = fields(block)
    all_tags = [tag for tag, _ in templates]
    deck: list[tuple[str, ...]] = []
    rows = []
    while len(rows) < count:
        if len(deck) < 4:
            deck = rng.sample(templates, len(templates))
        four, deck = deck[:4], deck[4:]
        questions, answer = [], []
        for place, (tag, template) in enumerate(four, start=1):
            value = tagging_number(tag, rng)
            sentence = template.format_map({**pick_values(rng, companies), "x": value})
            questions.append(
                f"{place}. What is the appropriate XBRL US GAAP tag for the number {value} in: "
                f'"{sentence}"'
            )
            answer.append(tag)
        others = [tag for tag in all_tags if tag not in answer]
        options = ", ".join(sorted([*answer, *rng.sample(others, 4)]))
        context = (
            "Give the best US GAAP tag for each of the four numbers below. Answer with the four "
            "tags only, in the order of the questions, with commas between them.\n"
            f"Tags to choose from: {options}\n" + "\n".join(questions) + "\nAnswer: "
        )
        rows.append({"context": context, "target": ", ".join(answer)})
    return rows


def term_rows(block: str, rng: random.Random) -> list[Row]:
    """One row for each term."""
    rows = [
        {
            "context": f"Explain this XBRL term briefly in one sentence: {term}. Answer:",
            "target": text,
        }
        for term, text in fields(block)
    ]
    rng.shuffle(rows)
    return rows


def filing_facts(revenue: int, rng: random.Random) -> dict[str, int]:
    """The facts of one year of a made-up filer with this revenue; they add up."""
    thousand = 1000
    cost = revenue * rng.randint(45, 70) // 100 // thousand * thousand
    expenses = revenue * rng.randint(12, 24) // 100 // thousand * thousand
    income = revenue - cost - expenses
    interest = income * rng.randint(5, 15) // 100 // thousand * thousand
    tax = (income - interest) * rng.randint(18, 27) // 100 // thousand * thousand
    assets = revenue * rng.randint(115, 135) // 100 // thousand * thousand
    current = assets * rng.randint(30, 45) // 100 // thousand * thousand
    debts = assets * rng.randint(46, 58) // 100 // thousand * thousand
    return {
        "Revenues": revenue,
        "CostOfRevenue": cost,
        "GrossProfit": revenue - cost,
        "OperatingExpenses": expenses,
        "OperatingIncomeLoss": income,
        "InterestExpense": interest,
        "IncomeTaxExpenseBenefit": tax,
        "ProfitLoss": income - interest - tax,
        "AssetsCurrent": current,
        "InventoryNet": current * rng.randint(20, 40) // 100 // thousand * thousand,
        "Assets": assets,
        "LiabilitiesCurrent": debts * rng.randint(30, 55) // 100 // thousand * thousand,
        "Liabilities": debts,
        "StockholdersEquity": assets - debts,
    }


def filing_xml(years: dict[int, dict[str, int]], concepts: list[str], rng: random.Random) -> str:
    """An XBRL snippet with the contexts, the unit and the chosen facts of each year."""
    lines = ["<xbrl>"]
    for year in years:
        period = f"<startDate>{year}-01-01</startDate><endDate>{year}-12-31</endDate>"
        instant = f"<instant>{year}-12-31</instant>"
        lines += [
            f'<context id="D{year}"><period>{period}</period></context>',
            f'<context id="I{year}"><period>{instant}</period></context>',
        ]
    lines.append('<unit id="USD"><measure>iso4217:USD</measure></unit>')
    facts = [
        f'<us-gaap:{concept} contextRef="{"I" if concept in BALANCE_CONCEPTS else "D"}{year}" '
        f'unitRef="USD" decimals="-3">{values[concept]}</us-gaap:{concept}>'
        for year, values in years.items()
        for concept in concepts
    ]
    rng.shuffle(facts)
    return "\n".join([*lines, *facts, "</xbrl>"])


def extract_row(
    kind: str, place: int, questions: dict[str, str], rng: random.Random, companies: list[str]
) -> Row:
    """One filing and one question of the kind; the key comes from the facts."""
    year = rng.randint(2019, 2024)
    revenue = rng.randint(80_000, 900_000) * 1000
    before = revenue * rng.randint(88, 106) // 100_000 * 1000
    years = {year: filing_facts(revenue, rng), year - 1: filing_facts(before, rng)}
    now = years[year]
    concept = list(CONCEPTS)[place % len(CONCEPTS)]
    ratio = list(RATIOS)[place % len(RATIOS)]
    above, below, percent = RATIOS[ratio]
    wanted = [concept] if kind in ("tags", "value") else [above, below]
    others = [name for name in CONCEPTS if name not in wanted]
    concepts = [*wanted, *rng.sample(others, 6 - len(wanted))]
    rng.shuffle(concepts)
    times = " * 100" if percent else ""
    terms = {
        "formula": (f"us-gaap:{above}", f"us-gaap:{below}"),
        "formula_calculations": (str(now[above]), str(now[below])),
    }
    if kind == "tags":
        target = f"us-gaap:{concept}"
    elif kind == "value":
        target = str(now[concept])
    else:
        first, second = terms[kind]
        target = f"({first} / {second}){times}"
    question = questions[kind].format(
        co=rng.choice(companies),
        what=CONCEPTS[concept],
        ratio=ratio,
        pct=" in percent" if percent else "",
        y=year,
    )
    return {
        "context": f"Use the XBRL data below. {EXTRACT_FORMS[kind]}\nQuestion: {question}\n"
        f"{filing_xml(years, concepts, rng)}\nAnswer: ",
        "target": target,
    }


def extract_rows(
    kinds: tuple[str, ...],
    count: int,
    questions: dict[str, str],
    rng: random.Random,
    companies: list[str],
) -> list[Row]:
    """So many rows of every kind."""
    rows = [
        extract_row(kind, place, questions, rng, companies)
        for kind in kinds
        for place in range(count)
    ]
    rng.shuffle(rows)
    return rows


def formula_rows(block: str, times: int, rng: random.Random) -> list[Row]:
    """Each question of a formula so many times, with new numbers and a computed key."""
    rows: dict[str, Row] = {}
    for spec in FORMULAS:
        for template in (question for name, question in fields(block) if name == spec.name):
            goal = len(rows) + times
            while len(rows) < goal:
                values = draw_numbers(spec.draw, rng)
                question = template.format_map(shown(values))
                rows[question] = {
                    "context": f"Use formula {spec.name} to answer the question. Answer with a "
                    "numerical answer with 2 decimal places and with no explanations or other "
                    f"text. Formula: {spec.formula}, Explanation: {spec.explanation}. "
                    f'Question: "{question}". Answer:',
                    "target": cents(spec.solve(values)),
                }
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def report_values(rng: random.Random, companies: list[str]) -> Values:
    """The figures of one made-up annual report, in millions."""

    def part(whole: int, low: int, high: int) -> int:
        return whole * rng.randint(low, high) // 100

    rev0 = rng.randint(300, 2400)
    rev = rev0 + part(rev0, 3, 19)
    cost, cost0 = part(rev, 52, 70), part(rev0, 52, 70)
    rev1 = part(rev, 56, 74) if rng.random() < 0.5 else part(rev, 26, 44)
    seg1, seg2 = rng.sample(SEGMENTS, 2)
    capex, ocf = part(rev, 4, 9), part(rev, 11, 18)
    ca, cl = part(rev, 36, 58), part(rev, 18, 34)
    numbers = {
        "rev": rev,
        "rev0": rev0,
        "cost": cost,
        "cost0": cost0,
        "rev1": rev1,
        "rev2": rev - rev1,
        "capex": capex,
        "capex0": part(rev0, 4, 9),
        "ocf": ocf,
        "fcf": ocf - capex,
        "ca": ca,
        "cl": cl,
        "ppe": part(rev, 60, 90),
        "debt": part(rev, 20, 50),
        "sga": part(rev, 12, 18),
        "sga0": part(rev0, 12, 18),
        "rd": part(rev, 3, 8),
        "rd0": part(rev0, 3, 8),
        "staff": rng.randint(1100, 9800),
        "claim": rng.randint(12, 80),
    }

    def percent(above: int, below: int) -> str:
        return str((Decimal(above) / below * 100).quantize(Decimal("0.1"), ROUND_HALF_UP))

    return {
        **pick_values(rng, companies),
        **{name: f"{value:,}" for name, value in numbers.items()},
        "seg1": seg1,
        "seg2": seg2,
        "big_segment": seg1 if rev1 > rev - rev1 else seg2,
        "seg1_share": percent(rev1, rev),
        "growth": percent(rev - rev0, rev0),
        "gm": percent(rev - cost, rev),
        "cr": cents(Decimal(ca) / cl),
        "auditor": rng.choice(AUDITORS),
    }


def report_rows(block: str, times: int, rng: random.Random, companies: list[str]) -> list[Row]:
    """Questions on a short page of a report."""
    rows: dict[str, Row] = {}
    for question, answer, page in fields(block):
        goal = len(rows) + times
        while len(rows) < goal:
            values = report_values(rng, companies)
            asked = question.format_map(values)
            text = page.replace(" ;; ", "\n").format_map(values)
            rows[asked] = {
                "context": "Answer the question in a few words from the scanned report page. "
                f"Question: {asked}\nPage {rng.randint(12, 118)}:\n{text}\n\nAnswer:",
                "target": answer.format_map(values),
            }
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


# ---------------------------------------------------------------- all files


def build() -> dict[str, list[Row]]:
    """Build the rows of every file; each file has its own random stream."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{SEED}:{name}")

    train, test = TRAIN_COMPANIES, TEST_COMPANIES
    files = {
        "train/finlora_sentiment_train": sentiment_rows(
            TRAIN_SENTIMENT, 6, rng("sentiment"), train
        ),
        "test/fpb_test": sentiment_rows(TEST_SENTIMENT, 4, rng("fpb"), test),
        "test/fiqa_test": sentiment_rows(FIQA, 2, rng("fiqa"), test, noun="tweet"),
        "test/tfns_test": sentiment_rows(TFNS, 2, rng("tfns"), test, noun="tweet"),
        "test/nwgi_test": sentiment_rows(NWGI, 2, rng("nwgi"), test, labels=NWGI_LABELS),
        "train/headline_train": headline_rows(TRAIN_HEADLINES, rng("headline train"), train),
        "test/headline_test": headline_rows(TEST_HEADLINES, rng("headline test"), test),
        "train/ner_train": entity_rows(
            TRAIN_LOAN_SENTENCES, rng("ner train"), TRAIN_ORGS, TRAIN_LOAN_PEOPLE, TRAIN_PLACES
        ),
        "test/ner_test": entity_rows(
            TEST_LOAN_SENTENCES, rng("ner test"), TEST_ORGS, TEST_LOAN_PEOPLE, TEST_PLACES
        ),
        "train/cfa_train": exam_rows(TRAIN_EXAM, TRAIN_COMPUTED, 4, rng("cfa")),
        "test/cfa_level1_test": exam_rows(LEVEL1_EXAM, LEVEL1_COMPUTED, 4, rng("level1")),
        "test/cfa_level2_test": exam_rows(LEVEL2_EXAM, LEVEL2_COMPUTED, 4, rng("level2")),
        "test/cfa_level3_test": exam_rows(LEVEL3_EXAM, LEVEL3_COMPUTED, 4, rng("level3")),
        "test/cpa_reg_test": exam_rows(REG_EXAM, REG_COMPUTED, 3, rng("reg")),
        "train/finer_train_batched": tagging_rows(TRAIN_TAGGING, 26, rng("finer train"), train),
        "test/finer_test_batched": tagging_rows(TEST_TAGGING, 20, rng("finer test"), test),
        "test/fnxl_test_batched": tagging_rows(FNXL_TAGGING, 20, rng("fnxl"), test),
        "train/xbrl_term_train": term_rows(TRAIN_TERMS, rng("term train")),
        "test/xbrl_term_test": term_rows(TEST_TERMS, rng("term test")),
        "train/xbrl_extract_train": extract_rows(
            EXTRACT_KINDS, 12, TRAIN_EXTRACT, rng("extract"), train
        ),
        "train/formula_train": formula_rows(TRAIN_QUESTIONS, 3, rng("formula train")),
        "test/formula_test": formula_rows(TEST_QUESTIONS, 4, rng("formula test")),
        "train/financebench_train": report_rows(TRAIN_PAGES, 3, rng("bench train"), train),
        "test/financebench_test": report_rows(TEST_PAGES, 3, rng("bench test"), test),
    }
    for kind in EXTRACT_KINDS:
        files[f"test/xbrl_extract_{kind}_test"] = extract_rows(
            (kind,), 20, TEST_EXTRACT, rng(f"extract {kind}"), test
        )
    return {f"{name}.jsonl": rows for name, rows in sorted(files.items())}


def render(rows: list[Row]) -> bytes:
    """The bytes of a file: one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main(arguments: list[str]) -> int:
    """Write the files, or with --check compare them with what would be written."""
    if arguments not in ([], ["--check"]):
        raise SystemExit("usage: make.py [--check]")
    for name, rows in build().items():
        path, content = HERE / name, render(rows)
        if not arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            print(f"{name} differs from what make.py writes", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
