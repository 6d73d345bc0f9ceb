"""First words in several languages, for a model to go on from; written for this package."""

from __future__ import annotations

OPENINGS: dict[str, tuple[str, ...]] = {
    "English": (
        "The bus was late again this morning, so I walked along the river and",
        "To plant a small tree, first dig a hole that is twice as wide as",
        "Three friends opened a bakery in the old station. In the first year they",
    ),
    "German": (
        "Der Bus kam heute Morgen wieder zu spät, also ging ich am Fluss entlang und",
        "Wer einen kleinen Baum pflanzen will, gräbt zuerst ein Loch, das doppelt so breit ist wie",
        "Drei Freundinnen eröffneten im alten Bahnhof eine Bäckerei. Im ersten Jahr haben sie",
    ),
    "French": (
        "Le bus était encore en retard ce matin, alors j'ai marché le long de la rivière et",
        "Pour planter un petit arbre, il faut d'abord creuser un trou deux fois plus large que",
        "Trois amies ont ouvert une boulangerie dans l'ancienne gare. La première année, elles",
    ),
    "Spanish": (
        "El autobús llegó tarde otra vez esta mañana, así que caminé por la orilla del río y",
        "Para plantar un árbol pequeño, primero hay que cavar un hoyo dos veces más ancho que",
        "Tres amigos abrieron una panadería en la vieja estación. Durante el primer año",
    ),
    "Portuguese": (
        "O ônibus atrasou de novo hoje de manhã, então fui andando pela margem do rio e",
        "Para plantar uma árvore pequena, primeiro cave um buraco duas vezes mais largo que",
        "Três amigas abriram uma padaria na antiga estação. No primeiro ano, elas",
    ),
    "Italian": (
        "Anche stamattina l'autobus era in ritardo, così ho camminato lungo il fiume e",
        "Per piantare un piccolo albero bisogna prima scavare una buca larga il doppio di",
        "Tre amici hanno aperto un forno nella vecchia stazione. Nel primo anno hanno",
    ),
    "Dutch": (
        "De bus was vanmorgen weer te laat, dus liep ik langs de rivier en",
        "Wie een kleine boom wil planten, graaft eerst een gat dat twee keer zo breed is als",
        "Drie vriendinnen begonnen een bakkerij in het oude station. In het eerste jaar",
    ),
    "Polish": (
        "Autobus znowu się dziś rano spóźnił, więc poszłam wzdłuż rzeki i",
        "Aby posadzić małe drzewo, najpierw trzeba wykopać dół dwa razy szerszy niż",
        "Trzej przyjaciele otworzyli piekarnię na starym dworcu. W pierwszym roku",
    ),
    "Russian": (
        "Сегодня утром автобус опять опоздал, поэтому я пошёл вдоль реки и",
        "Чтобы посадить небольшое дерево, сначала выкопайте яму, которая вдвое шире, чем",
        "Три подруги открыли пекарню в здании старого вокзала. За первый год они",
    ),
    "Turkish": (
        "Otobüs bu sabah yine geç kaldı, ben de nehir boyunca yürüdüm ve",
        "Küçük bir ağaç dikmek için önce iki kat daha geniş bir çukur kazmak gerekir, çünkü",
        "Üç arkadaş eski istasyonda bir fırın açtı. İlk yıl içinde",
    ),
    "Arabic": (
        "تأخرت الحافلة مرة أخرى هذا الصباح، فمشيت على ضفة النهر و",
        "لزراعة شجرة صغيرة، احفر أولاً حفرة عرضها ضعف",
        "افتتح ثلاثة أصدقاء مخبزاً في المحطة القديمة. في السنة الأولى",
    ),
    "Hindi": (
        "आज सुबह बस फिर देर से आई, इसलिए मैं नदी के किनारे पैदल चला और",
        "छोटा पेड़ लगाने के लिए पहले एक गड्ढा खोदें, जो जड़ों से दोगुना चौड़ा हो, और",
        "तीन दोस्तों ने पुराने स्टेशन में एक बेकरी खोली। पहले साल में",
    ),
    "Chinese": (
        "今天早上公交车又晚点了，所以我沿着河边走，",
        "种一棵小树，首先要挖一个比树根宽一倍的坑，然后",
        "三个朋友在老火车站开了一家面包店。第一年，他们",
    ),
    "Japanese": (
        "今朝もバスが遅れたので、私は川沿いを歩いて、",
        "小さな木を植えるには、まず根の二倍の幅の穴を掘り、",
        "三人の友人が古い駅舎でパン屋を始めた。最初の年、",
    ),
    "Korean": (
        "오늘 아침에도 버스가 늦어서 나는 강을 따라 걸었고",
        "작은 나무를 심으려면 먼저 뿌리보다 두 배 넓은 구덩이를 파고",
        "세 친구가 오래된 역에 빵집을 열었다. 첫해에 그들은",
    ),
}
