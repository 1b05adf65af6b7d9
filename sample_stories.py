"""Simple children's stories from a small grammar: offline, endless and deterministic.

    python sample_stories.py COUNT [--seed N]

prints COUNT stories, each followed by a line "<|endoftext|>", which is the format of the TinyStories text files.
They are for a first training run without a network, and for tests and benchmarks.

A plot is a template.  "{slot}" stands for a word that stays the same through the whole story (the hero's name, the
color of a lost ball), and "[this|that|]" for one of its choices, which may be empty.  Each line is a paragraph; an
indented line continues it.
"""

import argparse
import functools
import inspect
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SEPARATOR = "<|endoftext|>"

OR_BEGIN = 0.25  # stories that begin with the event ("One day, a little girl ...") and not with the hero
VILLAGE = 0.34  # stories that begin with "Once upon a time, in a small village, ..."
EVENING = 0.12  # stories that end with a look back in the evening, of the plots that can
EPISODE = 0.05  # stories that go on with a second, smaller one

GIRLS = ("Lily", "Mia", "Anna", "Emma", "Sara", "Ella", "Rosie", "Lucy", "Nora", "Amy", "Molly", "Zoe")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Noah", "Peter", "Oscar", "Luke")
ANIMALS = ("Pip", "Coco", "Momo", "Nibbles", "Bobo", "Mossy", "Tiko", "Pebble", "Pepper", "Nutmeg")
PETS = ("Biscuit", "Fluffy", "Teddy", "Cookie", "Patch", "Luna", "Rusty")
GROWNUPS = (("mom", "she"), ("mom", "she"), ("dad", "he"), ("grandma", "she"), ("grandpa", "he"))
ADJECTIVES = ("little", "little", "little", "cheerful", "curious", "young")
COLORS = ("red", "blue", "green", "yellow")
TIMES = ("One day", "One day", "One morning", "One sunny day", "One sunny morning")

VILLAGE_INTRO = "Once upon a time, in a small village, there [was|lived] a {who}."
INTROS = (
    "Once upon a time, there was a {who}.",
    "Once upon a time, there lived a {who}.",
    "There once was a {who}.",
    "Once there was a {who}.",
    "{name} was a {adjective} {kid}.",
)


class Plot(NamedTuple):
    """A plot: what to choose for it, and its template."""

    name: str
    # Slots to fill: "a" from words, "a, b" with two different words, or from tuples (a, b) that belong together.
    # A plot that chooses "kid" itself is about animals; in all others the kid is a girl or a boy.
    picks: dict[str, Sequence]
    # The first paragraph introduces the hero, the OR paragraph may take its place, the last one ends the story.
    text: str
    best: str = ""  # completes "The best part of my day was ..."; empty: no evening is left to look back


PLOTS = (
    Plot(
        "the lost toy",
        {
            "color": COLORS, "toy": ("ball", "toy car", "toy train", "teddy bear"),
            "place, place2, place3": ("under the bed", "behind the door", "under the chair", "in the closet"),
        },
        """
        {intro} {He} had a {color} {toy}[, and {he} loved it very much|. It was {his} favorite toy]. {one_day}, {name}
            could not find the {color} {toy}.
        OR {one_day}, a {who} could not find {his} {color} {toy}. [It was {his} favorite toy.|]
        "Where is my {toy}?" [asked|said] {name}. {He} looked {place}. The {toy} was not there. [{He} looked {place2}.
            The {toy} was not there. |]{name} [began to cry|was very sad].
        "What is wrong, {name}?" asked {his} {mom}. "I lost my {toy}," said {name}. "[I will help you|We will look for
            it together]," said {Mom}.
        [First, they looked in the kitchen. There was only a spoon in the big pot. Then they looked in the garden. There
            was only a snail behind the flowers. "Snail, did you see my {toy}?" asked {name}. The snail did not say a
            word. So they went back to the bedroom.||||]
        Then {name} looked {place3}, and there was the {color} {toy}! "I found my {toy}!" {he} shouted. [{He} hugged the
            {toy}, and then {he} hugged {Mom}, too.|]
        [From that day on, {name} always put the {toy} on the shelf before bed.|"Thank you for your help, {Mom}," said
            {name}. {He} played with the {toy} all day.|{name} was happy again. It is good to look for things together.]
        """,
        "finding my {toy}",
    ),
    Plot(
        "sharing",
        {"treat": ("cookie", "muffin", "bun", "sandwich"), "size": ("big", "fresh", "warm")},
        """
        {intro} {one_day}, {name} took a {size} {treat} to the park. {His} friend {friend} was there, too.
        OR {one_day}, a {who} took a {size} {treat} to the park. {His} friend {friend} was there, too.
        {friend} looked at the {treat}. "[I am so hungry|My tummy is empty]," said {friend}. "May I have some of your
            {treat}, please?" "No," said {name}. "It is my {treat}." {friend} [did not say a word|was sad].
        {name} took a bite of the {treat}, but it did not taste good. [{He} looked at {friend}. {friend} looked so
            sad.|]
        [Then {name} remembered something. Last week, {he} forgot {his} lunch, and {friend} gave {him} half of a banana.
            {friend} did not say no. {friend} just smiled and gave {him} the bigger half.||||]
        So {name} broke the {treat} in two. ["I am sorry, {friend}," {he} said. "Half of the {treat} is for you."|"Half
            of the {treat} is for you, {friend}," {he} said.] ["Thank you, {name}!" said {friend}.|]
        [They sat in the sun and ate.|They sat under a tree and ate.|] Now the {treat} tasted very good.
        [{name} learned that food tastes better when you share it.|From that day on, {name} and {friend} always shared
            their food.|The next day, {friend} came with two apples. "One apple is for you, {name}," {f_he} said.]
        """,
        "sharing my {treat} with {friend}",
    ),
    Plot(
        "afraid of the dark",
        {
            "spiders": ("spiders", "big dogs", "bugs", "loud noises"),
            "monster": ("bear", "monster", "giant", "wolf"), "coat": ("coat", "bathrobe", "raincoat"),
            "door": ("door", "window", "closet"),
        },
        """
        {intro} {name} was not afraid of {spiders}, but {he} was afraid of the dark. One night, {he} [could not
            sleep|woke up].
        OR One night, a {who} could not sleep. {He} was afraid of the dark.
        {name} saw something [by|next to] the {door}. It was [very big|big and black], and it looked like a {monster}.
            "{Mom}! {Mom}!" cried {name}. "There is a {monster} in my room!"
        {His} {mom} came [quickly|at once] and turned on the light. There was no {monster}. "Look, {name}," said {Mom}.
            "It is only your {coat}."
        [{Mom} turned the light off again. "What do you see now?" asked {Mom}. "I see my {coat}," said {name}. {Mom}
            turned the light on. "And what do you see now?" asked {Mom}. "I still see my {coat}," said {name}. "It is
            the same in the dark and in the light!"||||]
        {name} laughed. "You are a silly {coat}," {he} said. [Then {Mom} opened the curtain. The moon was big and round.
            "The moon is your night light," said {Mom}. {name} looked at the moon, and soon {he} was fast asleep.|{Mom}
            gave {him} a kiss, and soon {name} was fast asleep.]
        [From that night on, {name} was not afraid of the dark.|In the morning, {name} looked at the {door}. "Good
            morning, silly {coat}," {he} said.|{name} learned that there is nothing to fear in the dark.]
        """,
    ),
    Plot(
        "the storm",
        {"pet": ("dog", "cat", "puppy", "kitten"), "petname": PETS, "bed": ("bed", "table", "sofa")},
        """
        {intro} {He} had a {pet} named {petname}. One evening, [dark clouds came, and|] it began to rain.
        OR One evening, a {who} sat by the window with {his} {pet}, {petname}. [Dark clouds came, and it|It] began to
            rain.
        Boom! The thunder was very loud. {name} was scared. {He} wanted to hide under the {bed}. But somebody was
            already under the {bed}. It was {petname}! [The poor {pet} was shaking.|]
        "Oh, {petname}, are you scared, too?" asked {name}. [{He} put {his} arms around {petname}. "Do not be afraid,
            {petname}. I am here."|] {name} [sang a song|told a story] to {petname}, and soon they were not scared
            anymore.
        [Then {his} {mom} came in with a candle. "Where are you, {name}?" asked {Mom}. "We are under the {bed}," said
            {name}. "We are very brave here." {Mom} laughed and brought them a warm blanket. Then {Mom} sat down on the
            floor next to them, and they listened to the rain together.||||]
        In the morning, [the sun was shining, and|the rain was over, and] there was a big rainbow in the sky. ["Look,
            {petname}!" said {name}. "The storm made a rainbow for us."|]
        [{name} learned that you feel brave when you help a friend.|{name} and {petname} ran outside and played in the
            wet grass.|From that day on, {name} and {petname} were not afraid of storms.]
        """,
    ),
    Plot(
        "learning to ride",
        {
            "color": COLORS, "bush": ("a bush", "the soft grass", "a pile of leaves"),
            "gate": ("to the gate", "around the pond", "to the big tree and back"),
        },
        """
        {intro} {He} had a new {color} bike, but {he} did not know how to ride it. {one_day}, {he} went to the park with
            {his} {mom}.
        OR {one_day}, a {who} took {his} new {color} bike to the park. {His} {mom} came to help.
        {name} sat on the bike. [The bike went left. The bike went right.|The bike went left and right.] Bump! {name}
            fell into {bush}.
        "It is too hard," said {name}. "[Try again|Let us try again]," said {Mom}. So {name} tried again. Bump! {name}
            fell again. [But this time, {he} laughed.|]
        [A big boy came by on his bike. "I fell ten times when I was learning," said the big boy. "Do not look at your
            feet. Look at the trees." {name} smiled. "Thank you," {he} said. "I will look at the trees."||||]
        {name} tried one more time. {His} feet went round and round, and {Mom} [let go|took {m_his} hands away]. "I am
            riding my bike!" shouted {name}. {He} rode all the way {gate}. ["You did it, {name}!" said {Mom}.|]
        [{name} learned that hard things become easy when you try again.|From that day on, {name} rode the {color} bike
            every day.|{name} was very proud and very happy.]
        """,
        "riding my {color} bike",
    ),
    Plot(
        "the seed",
        {
            "color, fruit": (("yellow", "sunflower"), ("orange", "pumpkin"), ("red", "tomato"), ("red", "strawberry")),
            "one_day": ("One spring day", "One spring morning", "One day in spring"), "tiny": ("tiny", "little"),
        },
        """
        {intro} {He} liked to work in the garden. {one_day}, {his} {mom} gave {him} a {tiny} seed.
        OR {one_day}, a {who} got a {tiny} seed from {his} {mom}.
        "It will be a big {color} {fruit}," said {Mom}. {name} put the seed into the ground and gave it some water. {He}
            waited, but nothing happened. "[Why does my seed not grow|Where is my {fruit}]?" asked {name}.
        "Seeds are slow," said {Mom}. [So|"Just wait." So] {name} gave the seed some water every day. [{He} sang to the
            seed, too.|] {He} waited and waited.
        [One day, a hungry crow came to the garden and wanted to eat the seed. "Go away, crow! This is my seed," said
            {name}. {He} gave the crow some bread and put little sticks around the seed. "Now you are safe, little
            seed," {he} said.||||]
        Then, one morning, {name} saw something small and green. ["My seed is growing!" {he} shouted.|] [The little
            plant grew and grew.|] At the end of the summer, there was a big {color} {fruit} in the garden. {name} was
            very [proud|happy].
        [{name} learned that good things need time.|The next spring, {name} put ten seeds into the ground.|"Tomorrow I
            will give a seed to my friend {friend}," said {name}. "Then {friend} can have a {fruit}, too."]
        """,
    ),
    Plot(
        "the surprise birthday",
        {
            "cake": ("chocolate", "strawberry", "apple", "lemon"), "saturday": ("Friday", "Saturday", "Sunday"),
            "kite": ("a toy boat", "a red kite", "a new book", "a drum"),
        },
        """
        {intro} One morning, {name} woke up and smiled. It was {his} birthday!
        OR One morning, a {who} woke up and smiled. It was {his} birthday!
        {name} ran to {his} {mom}. "What day is it today, {Mom}?" {he} asked. "It is {saturday}," said {Mom}. [{name}
            ran to {his} friend {friend}. "What day is it today, {friend}?" {he} asked. "It is {saturday}," said
            {friend}.|{His} friend {friend} only said good morning.]
        {name} walked home slowly[ and was very sad|]. "Everybody forgot my birthday," {he} said.
        [{He} sat down under a tree. A small gray cat came and sat down next to {him}. "Today is my birthday, cat," said
            {name}. The cat said meow and put its head on {his} knee. "Thank you, cat," said {name}. "You are the only
            one who came to my birthday."||||]
        But when {name} opened the door of the house, {he} heard a loud shout. "Surprise! Happy birthday, {name}!" {Mom}
            was there, and {friend} was there, and there was a big {cake} cake on the table.
        ["You did not forget my birthday!" said {name}.|] {Mom} [laughed|hugged {him}], and {friend} gave {him} {kite}.
        [It was the best birthday ever.|{name} ate three pieces of {cake} cake. It was the best birthday ever.|{name}
            was so happy that {he} danced around the table.]
        """,
        "the surprise",
    ),
    Plot(
        "the hurt bird",
        {"bird": ("Peep", "Chip", "Tiny", "Sunny"), "scarf": ("scarf", "towel", "sock", "cloth")},
        """
        {intro} {one_day}, {name} found a little bird in the garden. The bird could not fly, because its wing was hurt.
        OR {one_day}, a {who} found a little bird in the garden. The bird could not fly, because its wing was hurt.
        ["Poor little bird," said {name}. "I will help you."|"Oh, you poor bird," said {name}.] {He} took the bird home
            and put it in a box with a soft {scarf}. {name} named the bird {bird}.
        Every day, {name} gave {bird} some water and some seeds. ["You will fly again, {bird}," {he} said.|]
        [One day, a big gray cat jumped on the window. It saw the box, and it saw {bird}. "No, cat!" shouted {name}.
            {He} closed the window quickly and sat in front of the box until the cat went away. "I will take care of
            you, {bird}," said {name}.||||]
        After [two|three] weeks, the wing was well again. [{name} was sad, but {he} knew that a bird wants to fly.|]
            {name} opened the box. "Goodbye, {bird}," {he} said. {bird} flew up and up, [over the trees|into the blue
            sky].
        The next morning, {name} heard a song at the window. It was {bird}! ["You came back!" said {name}.|]
        [From then on, {bird} sang at the window every morning.|{name} was very happy. {bird} was free, and {bird} was
            still {his} friend.|]
        """,
    ),
    Plot(
        "a rainy day",
        {
            "ship, sea, whale, sail": (
                ("ship", "the sea", "a whale", "sail my ship"), ("ship", "the sea", "an island", "sail my ship"),
                ("rocket", "the moon", "a star", "fly my rocket"), ("train", "the zoo", "a lion", "drive my train"),
            ),
            "windows": ("round windows", "a big star", "a yellow sun"), "box": ("big box", "brown box", "very big box"),
        },
        """
        {intro} {He} liked to play in the garden. But one day, it rained and rained, and {name} could not go outside.
        OR One rainy day, a {who} sat by the window. {name} could not go outside.
        ["There is nothing to do," said {name}.|] Then {his} {mom} came in with a {box}. ["It is only a box," said
            {name}. "Look again," said {Mom}. "I see a {ship}."|"Look, it is a {ship}," said {Mom}.]
        {name} looked at the box. "I see a {ship}, too!" {he} said. [{He} painted {windows} on it.|] They sat down in
            the box.
        ["Where does the {ship} go?" asked {Mom}. "It goes to {sea}!" said {name}.|So they went to {sea}.] "Look, I see
            {whale}!" [said|shouted] {Mom}.
        ["Oh no!" cried {name}. "My teddy bear fell out of the {ship}!" {He} threw a long scarf to the teddy bear. {Mom}
            held on to {name}, and {name} held on to the scarf, and they saved the teddy bear. "That was close," said
            {Mom}.||||]
        They played until the rain stopped. "Do you want to [play|go] outside now?" asked {Mom}. "Not yet," said {name}.
            "First, I have to {sail} home."
        [{Mom} laughed, and they played some more.|{name} learned that a rainy day can be a lot of fun.|From that day
            on, {name} was never bored when it rained.]
        """,
        "the trip to {sea}",
    ),
    Plot(
        "the broken vase",
        {
            "color": COLORS, "flowers": ("roses", "tulips", "wild flowers"), "cat": ("cat", "dog"),
            "kitchen": ("kitchen", "bedroom", "living room"),
        },
        """
        {intro} One day, [it was cold outside, and|] {name} played with a {color} ball in the {kitchen}.
        OR One day, a {who} played with a {color} ball in the {kitchen}.
        {name} threw the ball [up, up, up|up and up]. Crash! The ball hit the vase, and the vase broke. {name} was
            scared. "I can say that the {cat} did it," {he} thought. But the {cat} looked at {him} with big [brown|sad]
            eyes, and {name} knew that it was wrong.
        [{name} hid the pieces in a box and sat down. {He} tried to read a book, but {he} could only think about the
            vase. {His} tummy hurt. So {he} took the pieces out again and put them on the table.||||]
        When {his} {mom} came in, {name} [took a deep breath|ran to {m_him}]. "I broke the vase," said {name}. "I am so
            sorry, {Mom}." ["I am sad about the vase," said {Mom}. "But I am happy that you told me the truth."|"I am
            happy that you told me the truth," said {Mom}.]
        [Together, they put the pieces back with glue. The vase looked a little funny, but they put {flowers} in
            it.|{Mom} gave {name} a big hug.]
        [From that day on, {name} always told the truth.|From that day on, {name} played with the ball in the
            garden.|{name} learned that it is always best to tell the truth.]
        """,
    ),
    Plot(
        "a new friend",
        {
            "bench": ("on a bench", "under a tree", "next to the pond"), "bush": ("bush", "rock", "tree"),
            "one_day": ("One day", "One sunny day", "One afternoon", "One sunny afternoon"),
        },
        """
        {intro} {one_day}, {name} saw a new {f_kid} in the park. The {f_kid} sat {bench} and did not play.
        OR {one_day}, a {who} saw a new {f_kid} in the park. The {f_kid} sat {bench} and did not play.
        "[Why do you sit here alone|Why do you not play]?" asked {name}. "I am new here," said the {f_kid}. ["I do not
            have any friends."|] "My name is {name}," said {name}. "And my name is {friend}," said the {f_kid}.
        "Do you want to play with me, {friend}?" asked {name}. "Yes, please," said {friend}. [They played hide and seek.
            {friend} hid behind a big {bush}. "I found you, {friend}!" shouted {name}, and they both laughed.|They went
            on the swings, and they laughed and laughed.]
        [Then three other children came to the park. "Who is this?" they asked. "This is my new friend {friend}," said
            {name}. "Do you want to play with us?" So they all played tag together, and {friend} was the fastest of
            all.||||]
        When the sun went down, they had to go home. ["Will you come back tomorrow?" asked {friend}. "Yes," said {name}.
            "I will come back tomorrow."|] {friend} was very happy[. {f_He} was not alone anymore|].
        [{name} learned that it is easy to make a friend. You only have to say hello.|From that day on, {name} and
            {friend} played in the park every day.|{name} was happy, too. {He} had a new friend.]
        """,
        "playing with {friend}",
    ),
    Plot(
        "the race",
        {
            "kid": ("duck", "hedgehog", "mouse", "pig"), "f_kid": ("fox", "rabbit", "squirrel", "goat"),
            "tree": ("the old tree", "the bridge", "the big rock"), "apples": ("apples", "berries", "nuts"),
        },
        """
        {intro} {one_day}, {name} ran a race with all the animals. They ran to {tree}. The winner would get a basket of
            {apples}.
        OR {one_day}, a {who} ran a race with all the animals. They ran to {tree}. The winner would get a basket of
            {apples}.
        "You are too slow, {name}," said {friend} the {f_kid}. ["One, two, three, go!" called the owl.|] {friend} ran
            fast, and {name} was the last of all.
        [The animals came to a little river. {name} was afraid of the deep water. But there were stones in the river, so
            {name} jumped from stone to stone. One, two, three, four, and {he} was on the other side!||||]
        Then {name} heard a cry. "Help! Help!" {friend} was stuck in the mud. [The other animals ran past, but {name}
            stopped.|{name} stopped at once.] {He} held out a long stick and pulled {friend} out of the mud.
        ["Now you cannot win," said {friend}. "A friend is more important than a race," said {name}.|] So {name} and
            {friend} ran side by side. They were the last, but all the animals clapped.
        ["The {apples} are for {name}," said the owl. "{name} has the kindest heart."|The owl gave {name} the {apples}.]
            And {name} shared the {apples} with {friend}.
        [From that day on, {name} and {friend} were best friends.|It is good to be fast, but it is better to be kind.|]
        """,
        "running with you",
    ),
    Plot(
        "the cake that went wrong",
        {
            "cake": ("chocolate", "apple", "carrot", "lemon"), "jar": ("white", "blue", "yellow"),
            "shelf": ("on the shelf", "by the window", "on the table"),
        },
        """
        {intro} {one_day}, {name} and {his} {mom} wanted to bake a {cake} cake.
        OR {one_day}, a {who} wanted to bake a {cake} cake with {his} {mom}.
        [They put flour, eggs and milk into a bowl. "Now we need sugar," said {Mom}.|"We need eggs and sugar," said
            {Mom}.] {name} saw a {jar} jar {shelf} and put three big spoons into the bowl. [Soon the house smelled
            good.|]
        When the cake was ready, they each took a bite. "Yuck!" said {name}. "Yuck!" said {Mom}. The cake was salty!
            [{name} looked at the {jar} jar. "Oh no," {he} said. "This is not sugar. This is salt!"|"This is not sugar,"
            said {name}. "This is salt!"]
        [{name} was sad, but {Mom} began to laugh. "Everybody makes mistakes," said {Mom}.|"Everybody makes mistakes,"
            said {Mom}.]
        ["When I was little, I made pancakes with pepper," said {Mom}. "Everybody at the table had to sneeze. My mother
            sneezed, my father sneezed, and even the dog sneezed!" {name} had to laugh, too.||||]
        So they baked another cake. This time, {name} tasted the sugar first. ["It is sweet," {he} said.|] The second
            {cake} cake was [soft and sweet|sweet and good].
        [{name} learned that you can always try again after a mistake.|From that day on, {name} always tasted the sugar
            first.|"This is the best cake in the world," said {name}, and {Mom} thought so, too.]
        """,
        "the second cake",
    ),
    Plot(
        "the lost puppy",
        {
            "color": ("brown", "white", "black"), "petname": PETS, "fence": ("a fence", "a bush", "a big tree"),
            "owner, arms": (("man", "his arms"), ("woman", "her arms")),
            "one_day": ("One day", "One afternoon", "One morning"),
        },
        """
        {intro} {one_day}, {name} heard a sad little cry behind {fence}. It was a small {color} puppy!
        OR {one_day}, a {who} heard a sad little cry behind {fence}. It was a small {color} puppy!
        {name} took the puppy home and gave it some [water|food]. ["Can we keep the puppy?" asked {name}. "No, we|"We]
            have to find its home," said {his} {mom}. So they went from house to house.
        "Is this your puppy?" asked {name} at the first house. "No," said the [baker|farmer]. ["Is this your puppy?"
            asked {name} at the second house. "No," said the [teacher|mailman].|]
        ["We have to tell more people," said {name}. {He} drew a big picture of the {color} puppy and hung it on a tree.
            Many people looked at the picture. Then a girl said, "I know this puppy! It lives in the last house on the
            road."||||]
        At the last house, an old {owner} opened the door. "{petname}! My {petname}!" cried the old {owner}. "Thank you,
            {name}! Please come and play with {petname} every day." The puppy jumped into {arms}.
        [From that day on, {name} and {petname} played together every day.|The next day, {name} came back with a ball,
            and {petname} ran to {him} at once.|{name} learned that it feels good to do the right thing.]
        """,
        "finding the puppy's home",
    ),
    Plot(
        "the picnic and the ants",
        {
            "meadow": ("the meadow", "the park", "the lake"),
            "treat": ("apple pie", "cherry pie", "carrot cake", "lemon cake"), "color": COLORS,
            "one_day": ("One day", "One sunny day", "One sunny morning"),
        },
        """
        {intro} {one_day}, {name} and {his} {mom} went to {meadow} for a picnic. They sat down on a {color} blanket to
            eat {treat}.
        OR {one_day}, a {who} went to {meadow} for a picnic with {his} {mom}. They sat down on a {color} blanket to eat
            {treat}.
        Then {name} saw [an ant on the blanket, and then {he} saw a long line of ants|a long line of ants on the
            blanket]. "Go away, ants!" shouted {name}. "This is our {treat}!"
        One ant picked up a crumb. ["Where does the ant go?" asked {name}. "Let us see," said {Mom}.|] {name} and {Mom}
            followed the ant [around a stone|over a stick|through the grass].
        [Then the crumb fell into a little hole, and the ant could not pull it out. But two other ants came to help.
            They pulled and pushed together, and the crumb came out again. "Good work, ants!" said {name}.||||]
        At last, the ant came home. [Many little ants were waiting there.|] "The ant brings the crumb to its family,"
            said {name}. [{name} was not angry anymore. |]{He} gave the ants a big piece of {treat}. "This is for your
            picnic," {he} said.
        [{name} learned that even a small animal takes care of its family.|It was a good day for {name}, and it was a
            good day for the ants.|Then {name} and {Mom} sat down on the {color} blanket again and ate the {treat}.]
        """,
        "the ants' picnic",
    ),
    Plot(
        "the boat on the pond",
        {
            "color": COLORS, "duck": ("duck", "swan", "goose"), "bread": ("bread", "crumbs"),
            "one_day": ("One day", "One sunny day", "One windy day", "One morning"),
        },
        """
        {intro} {He} had a little {color} boat. {one_day}, {name} and {his} {mom} took the {color} boat to the pond.
        OR {one_day}, a {who} took {his} little {color} boat to the pond. {His} {mom} came, too.
        {name} put the boat on the water. [It sailed and sailed.|] But then the wind blew, and the boat sailed away to
            the middle of the pond.
        "Come back, boat!" called {name}. The boat did not come back. {name} [was sad|began to cry]. ["The water is too
            deep," said {Mom}. "Let us think."|]
        [First, {name} took a long stick, but the stick was too short. Then {name} and {Mom} blew as hard as they could,
            but the boat only turned around and around. "We need somebody who can swim," said {Mom}.||||]
        Then a [big|white] {duck} came along. {name} threw some {bread} into the water. The {duck} swam [to the {bread}
            and|fast and] pushed the boat all the way to {name}!
        "Thank you, {duck}!" said {name} and gave the {duck} all the {bread}.
        [From that day on, {name} tied a long string to the {color} boat.|{name} learned that a good idea can help.|"Now
            it is your boat, too, {duck}," said {name}. "You are the captain." And {Mom} laughed.]
        """,
        "the {duck} who saved my boat",
    ),
    Plot(
        "the snowman",
        {
            "color": COLORS, "scarf": ("scarf", "hat"), "snowman": ("Puff", "Snowy", "Frost"),
            "one_day": ("One winter day", "One winter morning", "One cold day", "One cold morning"),
        },
        """
        {intro} {one_day}, {name} and {his} friend {friend} made a snowman in the garden.
        OR {one_day}, a {who} made a snowman in the garden. {His} friend {friend} came to help.
        [{friend} found two stones for the eyes.|] {name} found a carrot for the nose. "His name is {snowman}," said
            {name}. [{He} gave {snowman} a {color} {scarf}.|]
        ["{snowman} needs a friend," said {friend}. So they made a snow dog, too. The snow dog had two short ears and a
            long tail. {name} laughed. "Now {snowman} will not be alone in the night," {he} said.||||]
        But the next morning, the carrot was gone! ["Oh no!" said {name}. "Who took the carrot?"|"Who took the carrot?"
            asked {name}.] There were small tracks in the snow. They followed the tracks to a [bush|tree]. A little
            rabbit sat there, and it was eating the carrot.
        [{name} was not angry.|] "The rabbit is hungry," {he} said. {He} ran home and [came back with|got] two carrots.
            "One carrot is for you, rabbit," said {name}. "And one carrot is for {snowman}."
        [From then on, {name} and {friend} brought the rabbit a carrot every morning.|{snowman} had a nose again, and
            the rabbit was not hungry anymore.|{name} learned that it is good to help when somebody is hungry.]
        """,
        "helping the rabbit",
    ),
    Plot(
        "brave at the doctor's",
        {
            "ear, look": (("ear", "looked into"), ("throat", "looked into"), ("knee", "looked at")),
            "toy": ("teddy bear", "toy rabbit", "toy dog", "doll"), "button": ("Button", "Bella", "Honey"),
            "star": ("star", "heart", "lion"), "one_day": ("One day", "One morning"),
        },
        """
        {intro} {one_day}, {his} {ear} hurt. ["We have to go to the doctor, {name}," said {his} {mom}.|So {his} {mom}
            took {him} to the doctor.]
        OR {one_day}, a {who} woke up, and {his} {ear} hurt. "We have to go to the doctor, {name}," said {his} {mom}.
        "I am afraid of the doctor," said {name}. [{He} took {his} {toy} with {him}.|{He} held {his} {toy} tight.] The
            {toy} was named {button}.
        "Who is this?" asked the doctor. "This is {button}," said {name}. ["{button} is a little afraid."|] "I will
            start with {button}," said the doctor. The doctor {look} {button}'s {ear}. "{button} is very brave," said
            the doctor.
        "I am brave, too," said {name}. The doctor {look} {name}'s {ear}. It did not hurt at all!
        ["Now you can be the doctor," said the doctor. {name} listened to the heart of the doctor. Boom, boom, boom, it
            went. "Your heart is very good," said {name}, and they all laughed.||||]
        [{name} got a {star} sticker, and {button} got a {star} sticker, too.|{name} and {button} each got a {star}
            sticker.] [The next day|Two days later], {his} {ear} did not hurt anymore.
        [From that day on, {name} was not afraid of the doctor.|{name} learned that it is easier to be brave with a
            friend.|"When I am big, I want to be a doctor," said {name}. "And {button} will help me."]
        """,
    ),
    Plot(
        "too small to help",
        {
            "kid": ("mouse", "frog", "chick", "hedgehog"), "f_kid": ("bear", "badger", "dog", "fox"),
            "key": ("key", "ring", "coin"), "ground": ("the ground", "an old tree", "a big rock"),
        },
        """
        {intro} {name} was the smallest of all the animals. {one_day}, {friend} the {f_kid} dropped a {key} into a hole
            in {ground}.
        OR {one_day}, a {who} saw {friend} the {f_kid}. "My {key} fell into a hole in {ground}," said {friend}.
        {friend} put {f_his} paw into the hole, but the paw was too big. "I can help," said {name}. An old goat laughed.
            "You are too small to help," said the goat. "[Please try it|Please help me], {name}," said {friend}.
        [The hole was deep and very dark. "Are you afraid?" called {friend}. "Yes, a little," said {name}. "But I can be
            afraid and brave at the same time." And {name} went on, one step after the other.||||]
        {name} went [down and down|down into the hole]. Then {he} saw something shiny. It was the {key}! {name} took the
            {key} and climbed up again. "Here is your {key}, {friend}," said {name}.
        "Thank you, {name}!" said {friend}. [|"Only you could help me."] ["I am sorry, {name}," said the goat. "You are
            not too small to help."|]
        [From that day on, nobody said that {name} was too small.|Small friends can be a big help.|{name} was very proud
            and very happy.]
        """,
        "finding the {key} for you",
    ),
    Plot(
        "food for the winter",
        {
            "kid, food": (("squirrel", "nuts"), ("mouse", "berries"), ("rabbit", "carrots"), ("badger", "apples")),
            "f_kid": ("sparrow", "duck", "hedgehog"), "storm": ("snow", "storm", "wind"),
        },
        """
        {intro} All summer, {name} put {food} into {his} little house. "Now I have enough {food} for the winter," said
            {name}.
        OR One summer, a {who} put many {food} into {his} little house. "Now I have enough {food} for the winter," said
            {name}.
        Then winter came, and it was very cold. One evening, {friend} the {f_kid} [knocked at|stood at] the door. "The
            {storm} broke my house, and I have nothing to eat," said {friend}.
        [{name} looked at the {food}. "I do not want to be hungry," {he} thought. Then {he} looked at {friend}.|]
            {friend} was so [cold|sad]. "Come in, {friend}," said {name}. "I will share my {food} with you."
        [One day, {name} was sick and had to stay in bed. "Now I can help you," said {friend}. {friend} made hot tea and
            kept the fire warm all night. In the morning, {name} felt much better. "I am so glad that you are here,
            {friend}," said {name}.||||]
        They ate the {food} and [told funny stories|sang songs] by the fire. When spring came, there were still some
            {food} in the house. ["Look, {friend}!" said {name}. "It was enough for two."|"It was enough for two," said
            {name}.]
        [Then {name} and {friend} built a new house for {friend}, right next door.|{name} learned that a winter with a
            friend is not so cold.|From then on, {name} and {friend} worked together every summer.]
        """,
    ),
)

CHILD_EVENINGS = (
    """
    That night, {his} {mom} tucked {name} into bed. "What was the best part of your day?" asked {Mom}.
    "The best part of my day was {best}," said {name}. {Mom} kissed {him} good night, and {name} fell asleep with a
        smile.
    """,
    """
    That evening, {name} drew a picture of the day. "This is my favorite part," {he} said. "It was {best}." {Mom} looked
        at the picture for a long time and hung it on the kitchen wall.
    """,
    """
    That evening, {name} wrote a letter to {his} aunt. "The best part of my day was {best}," {he} wrote. A week later, a
        letter came back. "[I am so proud of you|What a good story], {name}," wrote {his} aunt.
    """,
)
ANIMAL_EVENINGS = (
    """
    That evening, {name} and {friend} sat under the stars. "What was the best part of your day?" asked {friend}. "The
        best part of my day was {best}," said {name}.
    """,
)
CHILD_EPISODES = (
    """
    Another day, {name} saw an old woman with a big bag of apples. Suddenly the bag broke, and the apples rolled all
        over the street. "Oh no, my apples!" cried the old woman.
    "I will help you," said {name}. {He} ran after the apples and picked them up, one by one. [One apple was hiding
        under a cart, but {name} found that apple, too.|]
    "You are a good {kid}," said the old woman, and she gave {name} the biggest apple. {name} shared the apple with
        {his} {mom}. It was very sweet.
    """,
    """
    Another day, {name} found a small silver key on the road. {He} asked the baker. "It is not my key," said the baker.
        {He} asked the farmer. "It is not my key," said the farmer.
    Then {name} saw [the mailman|a man with a big hat] in front of a house. The man looked in all his pockets, and he
        could not open his door. "Is this your key?" asked {name}.
    "Yes, that is my key!" said the man. "Thank you! Now I can go home." {name} was very proud.
    """,
    """
    Another day, {name} heard a soft meow. A small white kitten sat on top of a high wall, and it was afraid to come
        down. "Wait, little kitten," said {name}. "I will get help."
    {name} ran to {his} {mom}, and they came back with a long board. They put the board against the wall. The kitten put
        one paw on the board, and then it walked all the way down.
    "Good kitten!" said {name}. The kitten said meow and rubbed its head on {his} leg. {name} was very happy.
    """,
)
ANIMAL_EPISODES = (
    """
    Another day, {name} found a tiny ladybug on the path. "I am lost," said the ladybug. "I cannot find my leaf."
    "What does your leaf look like?" asked {name}. "It is big and green, and it has a hole like a heart," said the
        ladybug. {name} called {friend}, and together they looked at every leaf.
    At last, they found a big green leaf with a hole like a heart. "That is my leaf!" said the ladybug. "Thank you,
        {name}! Thank you, {friend}!"
    """,
)


def pick(rng: random.Random, options: Sequence):
    """Return one of the options.  (Of random's methods, only random() promises the same numbers in every Python.)"""
    return options[int(rng.random() * len(options))]


def pronouns(he: str, prefix: str = "") -> dict[str, str]:
    """Return the slots he, him, his, He, Him and His of somebody who is "he" or "she"."""
    him, his = ("him", "his") if he == "he" else ("her", "her")
    slots = {}
    for slot, word in (("he", he), ("him", him), ("his", his)):
        slots[prefix + slot] = word
        slots[prefix + slot.capitalize()] = word.capitalize()
    return slots


def cast(rng: random.Random, animals: bool) -> dict[str, str]:
    """Choose the hero, a friend and a grown-up, and return their slots."""
    slots = {}
    for prefix, name in (("", "name"), ("f_", "friend")):
        he = pick(rng, ("he", "she"))
        names = ANIMALS if animals else BOYS if he == "he" else GIRLS
        slots[name] = pick(rng, [other for other in names if other != slots.get("name")])
        slots[prefix + "kid"] = "boy" if he == "he" else "girl"
        slots |= pronouns(he, prefix)
    mom, he = pick(rng, GROWNUPS)
    return slots | {"mom": mom, "Mom": mom.capitalize()} | pronouns(he, "m_")


def choose(rng: random.Random, picks: dict[str, Sequence]) -> dict[str, str]:
    """Fill the slots of a plot's picks."""
    slots = {}
    for key, options in picks.items():
        names = key.split(", ")
        if isinstance(options[0], tuple):
            words = pick(rng, options)
        else:
            left = list(options)
            words = [left.pop(int(rng.random() * len(left))) for _ in names]
        slots.update(zip(names, words, strict=True))
    return slots


@functools.cache
def paragraphs(template: str) -> list[str]:
    """Return the paragraphs of a template, each on one line."""
    return re.sub(r"\n +", " ", inspect.cleandoc(template)).split("\n")


def expand(rng: random.Random, text: str) -> str:
    """Replace every "[this|that|]" by one of its choices, inner brackets first."""
    while "[" in text:
        text = re.sub(r"\[([^][]*)\]", lambda match: pick(rng, match[1].split("|")), text)
    return text


def tell(rng: random.Random, plot: Plot) -> str:
    """Tell one story with this plot."""
    choices = choose(rng, plot.picks)
    animals = "kid" in choices
    slots = {"one_day": pick(rng, TIMES), "adjective": pick(rng, ADJECTIVES)} | cast(rng, animals) | choices
    slots["who"] = "{adjective} {kid} named {name}".format_map(slots)
    slots["best"] = plot.best.format_map(slots)
    intro = VILLAGE_INTRO if rng.random() < VILLAGE / (1 - OR_BEGIN) else pick(rng, INTROS)
    slots["intro"] = intro.format_map(slots)

    begin, or_begin, *middle, end = paragraphs(plot.text)
    story = [or_begin.removeprefix("OR ") if rng.random() < OR_BEGIN else begin, *middle]
    if plot.best and rng.random() < EVENING:
        story += paragraphs(pick(rng, ANIMAL_EVENINGS if animals else CHILD_EVENINGS))
    else:
        story.append(end)
    if rng.random() < EPISODE:
        story += paragraphs(pick(rng, ANIMAL_EPISODES if animals else CHILD_EPISODES))

    text = expand(rng, "\n".join(story).format_map(slots))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return "\n".join(" ".join(line.split()) for line in text.split("\n") if line)


def sample_story(index: int, seed: int = 0) -> str:
    """Return story number `index`, which depends on seed and index alone."""
    rng = random.Random(f"{seed}:{index}")
    return tell(rng, pick(rng, PLOTS))


def sample_stories(count: int, seed: int = 0) -> Iterator[str]:
    """Yield the stories 0 to count - 1, one at a time."""
    for index in range(count):
        yield sample_story(index, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print simple children's stories in the format of TinyStories.")
    parser.add_argument("count", metavar="COUNT", type=int, help="how many stories to print")
    parser.add_argument("--seed", type=int, default=0, help="another seed prints other stories (default: 0)")
    arguments = parser.parse_args()
    if arguments.count < 0:
        print("sample_stories.py: COUNT must not be negative", file=sys.stderr)
        sys.exit(2)
    try:
        for story in sample_stories(arguments.count, arguments.seed):
            print(story, SEPARATOR, sep="\n")
        sys.stdout.flush()
    except BrokenPipeError:  # "| head" has seen enough; nothing may be flushed to the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
